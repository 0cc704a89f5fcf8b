// The CUDA library's entry points. Returned codes are CUDA's; 0 is success.

#include "launch.h"

extern "C" {

int64_t wkv_cuda_scratch(const WkvProblem* p, int generation) { return scratch_bytes(*p, generation); }

int wkv_cuda_forward(const WkvProblem* p, int generation, void* stream) {
    return run(Pass::forward, *p, generation, static_cast<Stream>(stream));
}

int wkv_cuda_backward(const WkvProblem* p, int generation, void* stream) {
    return run(Pass::backward, *p, generation, static_cast<Stream>(stream));
}

int wkv_cuda_step(const WkvProblem* p, int, void* stream) {
    return run(Pass::step, *p, WKV6_STEPS, static_cast<Stream>(stream));
}

// Bytes of shared memory of a kernel of the second generation: 0 forward, 1 states, 2 backward.
int64_t wkv_cuda_shared(int kernel, int float32_decay) {
    return float32_decay ? shared_bytes<float>(kernel) : shared_bytes<Bfloat16>(kernel);
}

const char* wkv_cuda_error(int code) {
    return code == kUnsupported ? "unsupported type or head size" : cudaGetErrorString(static_cast<cudaError_t>(code));
}
}
