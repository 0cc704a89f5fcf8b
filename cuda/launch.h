// The C functions of the library: which kernel, how many blocks, how much shared memory.

#pragma once

#include "wkv6_steps_backward.h"
#include "wkv6_tiles_backward.h"
#include "wkv6_tiles_forward.h"
#include "wkv7_steps_backward.h"

enum Wkv6Generation { WKV6_STEPS = 1, WKV6_TILES = 2 };

constexpr int kUnsupported = -1;

enum class Pass { forward, backward, step };

inline bool has_tiles(const WkvProblem& p, int generation) {
    return p.version == 6 && generation == WKV6_TILES && p.head_size == tiles::N && p.type == WKV_BFLOAT16;
}

template <int N, class In>
int forward_steps(const WkvProblem& p, Stream stream) {
    return launch(steps::forward<N, In, false>, p.sequences * p.heads * steps::Shape<N>::kBlocks, steps::Shape<N>::kThreads,
                  sizeof(steps::ForwardShared<N>), stream, p);
}

template <int N, class In>
int backward_steps(const WkvProblem& p, Stream stream) {
    const int64_t blocks = p.sequences * p.heads;
    const int error = launch(steps::forward<N, In, true>, blocks * steps::Shape<N>::kBlocks, steps::Shape<N>::kThreads,
                             sizeof(steps::ForwardShared<N>), stream, p);
    return error ? error
                 : launch(steps::backward<N, In>, blocks, steps::Shape<N>::kThreads,
                          sizeof(steps::BackwardShared<N>), stream, p);
}

template <int N, class In>
int decode_step(const WkvProblem& p, Stream stream) {
    return launch(steps::decode<N, In>, p.sequences * p.heads * steps::Shape<N>::kBlocks, steps::Shape<N>::kThreads,
                  sizeof(steps::ForwardShared<N>), stream, p);
}

// WKV-7.
template <int N, class In>
int run_steps7(Pass pass, const WkvProblem& p, Stream stream) {
    const int64_t heads = p.sequences * p.heads, blocks = heads * steps::Shape<N>::kBlocks;
    constexpr int threads = steps::Shape<N>::kThreads, shared = sizeof(steps7::ForwardShared<N>);
    switch (pass) {
        case Pass::forward:
            return launch(steps7::forward<N, In, false>, blocks, threads, shared, stream, p);
        case Pass::backward: {
            const int error = launch(steps7::forward<N, In, true>, blocks, threads, shared, stream, p);
            constexpr int more = sizeof(steps7::BackwardShared<N>);
            return error ? error : launch(steps7::backward<N, In>, heads, threads, more, stream, p);
        }
        default:
            return launch(steps7::decode<N, In>, blocks, threads, shared, stream, p);
    }
}

template <class Decay>
int forward_tiles(const WkvProblem& p, Stream stream) {
    return launch(tiles::forward<Decay>, p.sequences * p.heads, tiles::kThreads,
                  sizeof(tiles::ForwardShared<Decay>), stream, p);
}

template <class Decay>
int backward_tiles(const WkvProblem& p, Stream stream) {
    const int64_t blocks = p.sequences * p.heads;
    const int error = launch(tiles::states<Decay>, blocks, tiles::kThreads,
                             sizeof(tiles::StatesShared<Decay>), stream, p);
    return error ? error
                 : launch(tiles::backward<Decay>, blocks, tiles::kThreads,
                          sizeof(tiles::BackwardShared<Decay>), stream, p);
}

template <int N, class In>
int run_steps(Pass pass, const WkvProblem& p, Stream stream) {
    if (p.version == 7) {
        return run_steps7<N, In>(pass, p, stream);
    }
    switch (pass) {
        case Pass::forward:
            return forward_steps<N, In>(p, stream);
        case Pass::backward:
            return backward_steps<N, In>(p, stream);
        default:
            return decode_step<N, In>(p, stream);
    }
}

template <class In>
int run_head_size(Pass pass, const WkvProblem& p, Stream stream) {
    switch (p.head_size) {
        case 32:
            return run_steps<32, In>(pass, p, stream);
        case 64:
            return run_steps<64, In>(pass, p, stream);
        case 128:
            return run_steps<128, In>(pass, p, stream);
        default:
            return kUnsupported;
    }
}

template <class Decay>
int64_t shared_bytes(int kernel) {
    return kernel == 0   ? sizeof(tiles::ForwardShared<Decay>)
           : kernel == 1 ? sizeof(tiles::StatesShared<Decay>)
                         : sizeof(tiles::BackwardShared<Decay>);
}

template <class Decay>
int run_tiles(Pass pass, const WkvProblem& p, Stream stream) {
    return pass == Pass::forward ? forward_tiles<Decay>(p, stream) : backward_tiles<Decay>(p, stream);
}

inline int run(Pass pass, const WkvProblem& p, int generation, Stream stream) {
    if (p.bounds != nullptr) {
        if (const int error = launch(order_sequences, 1, kThreadsToOrder, 0, stream, p)) {
            return error;
        }
    }
    if (has_tiles(p, generation) && pass != Pass::step) {
        return p.decay_type == WKV_FLOAT32 ? run_tiles<float>(pass, p, stream) : run_tiles<Bfloat16>(pass, p, stream);
    }
    switch (p.type) {
        case WKV_FLOAT32:
            return run_head_size<float>(pass, p, stream);
        case WKV_BFLOAT16:
            return run_head_size<Bfloat16>(pass, p, stream);
        case WKV_FLOAT16:
            return run_head_size<Float16>(pass, p, stream);
        default:
            return kUnsupported;
    }
}

// Bytes of `scratch` for the backward pass: the states that it keeps, in WKV-7 with the tokens' u.
inline int64_t scratch_bytes(const WkvProblem& p, int generation) {
    const int64_t rows = p.head_size + (p.version == 7 ? kTile : 0);
    return has_tiles(p, generation)
               ? kept_states(p, tiles::kKeptEvery) * p.heads * static_cast<int64_t>(sizeof(tiles::KeptState))
               : kept_states(p, kTile) * p.heads * rows * p.head_size * static_cast<int64_t>(sizeof(float));
}
