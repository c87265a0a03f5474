// Read-only arrays that may start at any byte, as those of an .idx file do (its int32 sizes begin at byte 34).
#pragma once

#include <cstdint>
#include <cstring>

namespace hyperrouter {

template <typename T>
class View {
 public:
  View(const void* data, int64_t size) : data_(static_cast<const char*>(data)), size_(size) {}

  int64_t size() const { return size_; }

  // Asks for element i, which need not be there: reckoned without pointers, which may not leave their array.
  void prefetch(int64_t i) const {
    const auto address = reinterpret_cast<std::uintptr_t>(data_) + static_cast<std::uintptr_t>(i) * sizeof(T);
    __builtin_prefetch(reinterpret_cast<const void*>(address));
  }

  // Through memcpy, because reading a T at an odd address is undefined; compilers make one load of it.
  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, data_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

 private:
  const char* data_;
  int64_t size_;
};

}  // namespace hyperrouter
