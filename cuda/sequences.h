// Which tokens a block works on.

#pragma once

#include "primitives.h"

constexpr int kTile = 16;  // tokens that are read together

// Counts fit 31 bits, which Python checks: registers are scarce.
struct Sequence {
    int index;   // of the state
    int row;     // of the batch
    int begin;   // first token in the row
    int length;
    int head;
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

constexpr int kThreadsToOrder = 256, kMostToOrder = 1024;

// p.order: the packed sequences, longest first, so that none is left for the end. More than kMostToOrder stay as they
// are.
KERNEL(kThreadsToOrder, 1)
order_sequences(WkvProblem p) {
    for (int mine = thread_index(); mine < p.sequences; mine += kThreadsToOrder) {
        const int64_t length = packed_length(p, mine);
        int place = p.sequences > kMostToOrder ? mine : 0;
        for (int other = 0; p.sequences <= kMostToOrder && other < p.sequences; other++) {
            const int64_t its = packed_length(p, other);
            place += its > length || (its == length && other < mine);
        }
        p.order[place] = mine;
    }
}

// The sequence and head of the block's turn.
DEVICE Sequence sequence_of_turn(const WkvProblem& p, int64_t turn) {
    const int place = static_cast<int>(turn / p.heads);
    Sequence s;
    s.index = p.bounds != nullptr ? p.order[place] : place;
    s.head = static_cast<int>(turn % p.heads);
    s.row = p.bounds != nullptr ? 0 : s.index;
    s.begin = static_cast<int>(p.bounds != nullptr ? bound(p, s.index) : 0);
    s.length = static_cast<int>(p.bounds != nullptr ? packed_length(p, s.index) : p.tokens);
    return s;
}

// The first of the states that are kept `every` so many tokens of each sequence, and how many those of all are at most:
// the sum of the others' rounded-up counts is at most this: floor(a + b) - floor(a) + 1 >= ceil(b).
DEVICE int64_t first_kept(const WkvProblem& p, const Sequence& s, int every) {
    return (s.row * p.tokens + s.begin) / every + s.index;
}

inline int64_t kept_states(const WkvProblem& p, int every) { return p.batch * p.tokens / every + p.sequences; }

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
