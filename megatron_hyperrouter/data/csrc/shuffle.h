// numpy.random.RandomState.shuffle, bit for bit: the same draws of the same Mersenne Twister, in another order of
// memory accesses.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace hyperrouter {

// MT19937 (Matsumoto and Nishimura 1998) that goes on from a state of NumPy's and leaves one for NumPy.
class MersenneTwister {
 public:
  static constexpr int kWords = 624;

  // key: the 624 words of NumPy's state, changed in place; position: words of it that are used up, 0 to 624.
  MersenneTwister(uint32_t* key, int position) : key_(key), position_(position) { temper(); }

  int position() const { return position_; }

  uint32_t next() {
    if (position_ == kWords) refill();
    return ready_[position_++];
  }

 private:
  static constexpr int kShift = 397;

  void refill() {
    const auto twist = [](uint32_t high, uint32_t low, uint32_t far) {
      const uint32_t mixed = (high & 0x80000000u) | (low & 0x7fffffffu);
      return far ^ (mixed >> 1) ^ ((low & 1u) ? 0x9908b0dfu : 0u);
    };
    int i = 0;
    for (; i < kWords - kShift; ++i) key_[i] = twist(key_[i], key_[i + 1], key_[i + kShift]);
    for (; i < kWords - 1; ++i) key_[i] = twist(key_[i], key_[i + 1], key_[i + kShift - kWords]);
    key_[i] = twist(key_[i], key_[0], key_[kShift - 1]);
    position_ = 0;
    temper();
  }

  void temper() {
    for (int i = 0; i < kWords; ++i) {
      uint32_t word = key_[i];
      word ^= word >> 11;
      word ^= (word << 7) & 0x9d2c5680u;
      word ^= (word << 15) & 0xefc60000u;
      ready_[i] = word ^ (word >> 18);
    }
  }

  uint32_t* key_;
  int position_;
  uint32_t ready_[kWords];
};

// Fisher-Yates from the end, each index by masked rejection, as NumPy draws it.  Returns the new position in `key`.
// A block of draws comes before its swaps, so that the memory they touch can be fetched meanwhile.
template <typename T>
int shuffle(T* values, int64_t size, uint32_t* key, int position) {
  if (position < 0 || position > MersenneTwister::kWords) {
    throw std::invalid_argument("position = " + std::to_string(position) + " must be from 0 to 624");
  }
  if (size - 1 > static_cast<int64_t>(std::numeric_limits<uint32_t>::max())) {
    throw std::invalid_argument("size = " + std::to_string(size) +
                                " must be at most 2**32, because NumPy uses a different algorithm for larger arrays");
  }
  constexpr int64_t kBlock = 64;
  uint32_t draws[kBlock];
  MersenneTwister twister(key, position);
  for (int64_t i = size - 1; i > 0;) {
    const uint32_t mask = 0xffffffffu >> __builtin_clz(static_cast<uint32_t>(i));
    const int64_t same_mask =
        i - static_cast<int64_t>(mask >> 1);  // i, i - 1, ... share the mask down to a power of two
    const int64_t block = same_mask < kBlock ? same_mask : kBlock;
    for (int64_t k = 0; k < block;) {
      const uint32_t draw = twister.next() & mask;
      draws[k] = draw;
      k += draw <= static_cast<uint32_t>(i - k);  // a rejected draw is written over: no branch to mispredict
    }
    for (int64_t k = 0; k < block; ++k) __builtin_prefetch(values + draws[k], 1);
    for (int64_t k = 0; k < block; ++k) std::swap(values[i - k], values[draws[k]]);
    i -= block;
  }
  return twister.position();
}

}  // namespace hyperrouter
