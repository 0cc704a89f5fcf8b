// Runs the CUDA kernels' source on the CPU: cases from one file, results to another (tests/host_run.py).
//
//     host_run CASES RESULTS
//
// A case is a row of 64-bit integers, {version, pass, generation, order, batch, tokens, heads, head size, sequences,
// type, decay type, bonus type, packed, then for r k v w a b dy: elements, strides of batch, time, head}, then the bytes
// of bounds (if packed), u, r, k, v, w, a, b, state and, backwards, dy, dlast; what the version has not is empty. Results
// are the tensors of the pass, gradients in the order dr dk dv dw da db du dstate, without padding. Every array has
// memory of its own, so that the sanitizer sees any step beside it.

#include <string>

#include "launch.h"

namespace {

struct Header {
    int64_t version, pass, generation, order, batch, tokens, heads, head_size, sequences, type, decay_type, bonus_type,
        packed;
    int64_t rows[7][4];
};

FILE* cases;
FILE* results;

int64_t size_of(int64_t type) { return type == WKV_FLOAT32 ? 4 : 2; }

struct Array {
    char* data;
    size_t bytes;

    explicit Array(size_t size) : data(static_cast<char*>(malloc(size))), bytes(size) { memset(data, 0xff, size); }
    Array(const Array&) = delete;
    ~Array() { free(data); }

    void read() {
        if (fread(data, 1, bytes, cases) != bytes) {
            fprintf(stderr, "host run: the file of cases ends too early\n");
            exit(2);
        }
    }

    void write() const { fwrite(data, 1, bytes, results); }
};

struct Case {
    const Header& h;
    WkvProblem p = {};
    int64_t tokens, state;

    explicit Case(const Header& header) : h(header) {
        p.version = static_cast<int32_t>(h.version);
        p.batch = h.batch, p.tokens = h.tokens, p.heads = h.heads, p.head_size = h.head_size;
        p.sequences = h.sequences, p.type = static_cast<int32_t>(h.type);
        p.decay_type = static_cast<int32_t>(h.decay_type), p.bonus_type = static_cast<int32_t>(h.bonus_type);
        p.need_du = 1;
        tokens = h.batch * h.tokens * h.heads * h.head_size;
        state = 4 * h.sequences * h.heads * h.head_size * h.head_size;
    }

    WkvTokens strided(Array& x, int which) const {
        return {x.data, h.rows[which][1], h.rows[which][2], h.rows[which][3]};
    }

    WkvTokens dense(Array& x) const {
        return {x.data, h.tokens * h.heads * h.head_size, h.heads * h.head_size, h.head_size};
    }

    WkvState states(Array& x) const {
        const int64_t matrix = h.head_size * h.head_size;
        return {reinterpret_cast<float*>(x.data), h.heads * matrix, matrix};
    }

    int forward() {
        Array y(tokens * size_of(h.type)), last(state);
        p.y = dense(y), p.last = states(last);
        const int code = run(Pass::forward, p, static_cast<int>(h.generation), nullptr);
        y.write();
        last.write();
        return code;
    }

    int step(const Array& in_place) {
        Array y(tokens * size_of(h.type));
        p.y = dense(y);
        const int code = run(Pass::step, p, static_cast<int>(h.generation), nullptr);
        y.write();
        in_place.write();
        return code;
    }

    int backward() {
        Array dy(h.rows[6][0] * size_of(h.type)), dlast(state);
        dy.read();
        dlast.read();
        const size_t size = tokens * size_of(h.type), only7 = h.version == 7 ? size : 0;
        Array dr(size), dk(size), dv(size), dw(tokens * size_of(h.decay_type)), da(only7), db(only7), dstate(state);
        Array du(h.version == 6 ? 4 * h.sequences * h.heads * h.head_size : 0);
        Array scratch(scratch_bytes(p, static_cast<int>(h.generation)));
        p.dy = strided(dy, 6), p.dlast = states(dlast), p.dr = dense(dr), p.dk = dense(dk), p.dv = dense(dv);
        p.dw = dense(dw), p.da = dense(da), p.db = dense(db), p.du = reinterpret_cast<float*>(du.data), p.dstate = states(dstate);
        p.scratch = scratch.data;
        const int code = run(Pass::backward, p, static_cast<int>(h.generation), nullptr);
        for (const Array* x : {&dr, &dk, &dv, &dw, &da, &db, &du, &dstate}) {
            x->write();
        }
        return code;
    }
};

int run_case(const Header& h) {
    Case c(h);
    const auto bytes = [&](int which, int64_t type) { return h.rows[which][0] * size_of(type); };
    Array bounds(h.packed ? 8 * (h.sequences + 1) : 1);
    Array u(h.version == 6 ? h.heads * h.head_size * size_of(h.bonus_type) : 0);
    Array r(bytes(0, h.type)), k(bytes(1, h.type)), v(bytes(2, h.type)), w(bytes(3, h.decay_type));
    Array a(bytes(4, h.type)), b(bytes(5, h.type)), state(c.state), order(4 * h.sequences);
    if (h.packed) {
        bounds.read();
        c.p.bounds = reinterpret_cast<const int64_t*>(bounds.data);
        c.p.order = reinterpret_cast<int32_t*>(order.data);
    }
    for (Array* x : {&u, &r, &k, &v, &w, &a, &b, &state}) {
        x->read();
    }
    c.p.u = u.data;
    c.p.r = c.strided(r, 0), c.p.k = c.strided(k, 1), c.p.v = c.strided(v, 2), c.p.w = c.strided(w, 3);
    c.p.a = c.strided(a, 4), c.p.b = c.strided(b, 5);
    c.p.state = c.states(state);
    host::order = static_cast<int>(h.order);
    return h.pass == 0 ? c.forward() : h.pass == 1 ? c.backward() : c.step(state);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 || !(cases = fopen(argv[1], "rb")) || !(results = fopen(argv[2], "wb"))) {
        fprintf(stderr, "usage: host_run CASES RESULTS\n");
        return 2;
    }
    Header header;
    for (int64_t number = 0; fread(&header, sizeof header, 1, cases) == 1; number++) {
        if (const int code = run_case(header)) {
            fprintf(stderr, "host run: case %lld ended with code %d\n", static_cast<long long>(number), code);
            return 1;
        }
    }
    return fclose(results) == 0 ? 0 : 1;
}
