// A permutation of 0 .. size - 1 that a key names and that nothing stores: any element of it is a few multiplications.
#pragma once

#include <cstdint>

namespace hyperrouter {

// Stafford's thirteenth mixer of 64 bits (the one of SplitMix64, Steele, Lea and Flood 2014).
inline uint64_t mix(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
  return word ^ (word >> 31);
}

// A Feistel network over the smallest power of two that holds `size`: each round changes one half of the bits by a
// keyed function of the other half, which can be undone, so the whole is a permutation. What falls outside is permuted
// again until it falls inside (cycle walking, Black and Rogaway 2002): less than two rounds of it on average.
class KeyedPermutation {
 public:
  // size: 1 to 2**62.
  KeyedPermutation(int64_t size, uint64_t key) : size_(static_cast<uint64_t>(size)) {
    int bits = 1;
    while (bits < 62 && (uint64_t{1} << bits) < size_) ++bits;
    low_bits_ = bits - bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits / 2)) - 1;
    for (int round = 0; round < kRounds; ++round) keys_[round] = mix(key + (round + 1) * 0x9e3779b97f4a7c15u);
  }

  int64_t operator()(int64_t position) const {
    uint64_t value = static_cast<uint64_t>(position);
    do value = once(value);
    while (value >= size_);
    return static_cast<int64_t>(value);
  }

 private:
  static constexpr int kRounds = 6;

  uint64_t once(uint64_t value) const {
    uint64_t low = value & low_mask_, high = value >> low_bits_;
    for (int round = 0; round < kRounds; round += 2) {
      high ^= mix(low ^ keys_[round]) & high_mask_;
      low ^= mix(high ^ keys_[round + 1]) & low_mask_;
    }
    return high << low_bits_ | low;
  }

  uint64_t size_, low_mask_, high_mask_, keys_[kRounds];
  int low_bits_;
};

}  // namespace hyperrouter
