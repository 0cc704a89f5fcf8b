// The CUDA library's entry points. Returned codes are CUDA's; 0 is success.

#include "launch.h"

extern "C" {

int64_t wkv6_cuda_scratch(const Wkv6Problem* p, int generation) { return scratch_bytes(*p, generation); }

int wkv6_cuda_forward(const Wkv6Problem* p, int generation, void* stream) {
    return run(Pass::forward, *p, generation, static_cast<Stream>(stream));
}

int wkv6_cuda_backward(const Wkv6Problem* p, int generation, void* stream) {
    return run(Pass::backward, *p, generation, static_cast<Stream>(stream));
}

int wkv6_cuda_step(const Wkv6Problem* p, int, void* stream) {
    return run(Pass::step, *p, WKV6_STEPS, static_cast<Stream>(stream));
}

const char* wkv6_cuda_error(int code) {
    return code == kUnsupported ? "unsupported type or head size" : cudaGetErrorString(static_cast<cudaError_t>(code));
}
}
