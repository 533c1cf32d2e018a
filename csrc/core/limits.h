// Limits of one row pass.
#pragma once

namespace kdfuse {

constexpr int kMaxStreams = 64;  // rows that one gradient is made of

}  // namespace kdfuse
