// The decoding steps of both families, in the types that they have.

#pragma once

#include "rwkv6_cpu_step.h"
#include "rwkv7_cpu_step.h"

namespace {

// Calls use(step) with the step of the model's family and type.
template <class Use>
void with_step(const RwkvModel& model, const RwkvStep& step, wkv_cpu::Team& team, Use use) {
    if (model.version == 6 && model.type == WKV_FLOAT32) use(Step6<Float32>(model, step, team));
    if (model.version == 6 && model.type == WKV_BFLOAT16) use(Step6<Bfloat16>(model, step, team));
    if (model.version == 7 && model.type == WKV_FLOAT32) use(Step7<Float32>(model, step, team));
    if (model.version == 7 && model.type == WKV_BFLOAT16) use(Step7<Bfloat16>(model, step, team));
}

int64_t any_model_scratch(const RwkvModel& model, int64_t tokens) {
    wkv_cpu::Team alone = {1, 0, 0};
    RwkvStep step = {};
    step.tokens = tokens;
    int64_t bytes = 0;
    with_step(model, step, alone, [&](const auto& all) { bytes = all.scratch_bytes(); });
    return bytes;
}

void any_model_step(const RwkvModel& model, const RwkvStep& step, wkv_cpu::Team& team) {
    with_step(model, step, team, [](auto&& all) { all.run(); });
}

}  // namespace
