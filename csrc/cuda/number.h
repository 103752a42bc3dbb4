// The numbers of 16 bits that the kernels take.
#pragma once

namespace smi {

enum class Number { bf16, fp16 };

}  // namespace smi
