// What every thread that runs CPU kernels sets up.

#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wkv_cpu {

// Where dy is 0 for many tokens, dS decays to numbers below 1e-38, each of which would cost some processors a hundred
// cycles. In this scope they are zero.
class SubnormalsAreZero {
   public:
    SubnormalsAreZero(const SubnormalsAreZero&) = delete;
#if defined(__x86_64__)
    SubnormalsAreZero() { _mm_setcsr(before | 0x8040); }  // results and operands
    ~SubnormalsAreZero() { _mm_setcsr(before); }

   private:
    const unsigned before = _mm_getcsr();
#else
    SubnormalsAreZero() {}
#endif
};

}  // namespace wkv_cpu
