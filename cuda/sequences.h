// Which tokens a block works on.

#pragma once

#include "primitives.h"

constexpr int kTile = 16;  // tokens that are read, and remembered states apart, together

// Counts fit 31 bits, which Python checks: registers are scarce.
struct Sequence {
    int index;   // of the state
    int row;     // of the batch
    int begin;   // first token in the row
    int length;
    int head;
    int first_tile;  // of this sequence among the tiles of all: they never overlap
};

// Bounds that are out of order or out of range are cut off: wrong bounds give wrong numbers, never wrong addresses.
DEVICE int64_t bound(const WkvProblem& p, int64_t sequence) {
    const int64_t at = p.bounds[sequence];
    return at < 0 ? 0 : at > p.tokens ? p.tokens : at;
}

DEVICE int64_t packed_length(const WkvProblem& p, int64_t sequence) {
    const int64_t length = bound(p, sequence + 1) - bound(p, sequence);
    return length < 0 ? 0 : length;
}

// The sequence and head of the block's turn: the longest sequences come first, so that none is left for the end.
// `slot` is one word of shared memory. All threads of the block call this together.
DEVICE Sequence sequence_of_turn(const WkvProblem& p, int64_t turn, int threads, int* slot) {
    const int64_t place = turn / p.heads;
    int64_t index = place;
    if (p.bounds != nullptr && p.sequences <= threads) {
        const int64_t mine = thread_index();
        if (mine < p.sequences) {
            const int64_t length = packed_length(p, mine);
            int64_t before = 0;
            for (int64_t other = 0; other < p.sequences; other++) {
                const int64_t its = packed_length(p, other);
                before += its > length || (its == length && other < mine);
            }
            if (before == place) {
                *slot = static_cast<int>(mine);
            }
        }
        barrier();
        index = *slot;
        barrier();
    }
    Sequence s;
    s.index = static_cast<int>(index);
    s.head = static_cast<int>(turn % p.heads);
    s.row = p.bounds != nullptr ? 0 : s.index;
    s.begin = static_cast<int>(p.bounds != nullptr ? bound(p, index) : 0);
    s.length = static_cast<int>(p.bounds != nullptr ? packed_length(p, index) : p.tokens);
    // The sum of the others' rounded-up tiles is at most this: floor(a + b) - floor(a) + 1 >= ceil(b).
    s.first_tile = static_cast<int>((s.row * p.tokens + s.begin) / kTile + index);
    return s;
}

// How many tiles `first_tile` may name.
inline int64_t tiles_of(const WkvProblem& p) { return p.batch * p.tokens / kTile + p.sequences; }

template <class T>
DEVICE T* row_of(const WkvTokens& x, const Sequence& s, int token) {
    return static_cast<T*>(x.data) + s.row * x.batch + (s.begin + token) * x.time + s.head * x.head;
}

DEVICE int64_t offset_of(const WkvTokens& x, const Sequence& s, int token) {
    return s.row * x.batch + (s.begin + token) * x.time + s.head * x.head;
}

DEVICE float* matrix_of(const WkvState& x, const Sequence& s) {
    return x.data + s.index * x.sequence + s.head * x.head;
}
