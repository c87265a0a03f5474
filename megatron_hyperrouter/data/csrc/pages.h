// Memory for a large result, which is written once from end to end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hyperrouter {

// An array of `count` elements, not filled; std::bad_alloc where there is no room for it.
//
// NumPy asks for huge pages, and each of them can take milliseconds where memory is in pieces or where the host of a
// virtual machine has taken it back: up to as long as the work itself. One call for ordinary pages was seen to
// take less than huge ones, and than a fault for each.
template <typename T>
std::unique_ptr<T[]> unfilled(int64_t count) {
  if (count < 0 || count > PTRDIFF_MAX / static_cast<int64_t>(sizeof(T))) throw std::bad_alloc();
  std::unique_ptr<T[]> result(new T[static_cast<std::size_t>(count)]);
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto data = reinterpret_cast<std::uintptr_t>(result.get());
  const std::uintptr_t begin = (data + page - 1) / page * page;
  const std::uintptr_t end = (data + static_cast<std::uintptr_t>(count) * sizeof(T)) / page * page;
  // A kernel before 5.14 refuses; then each page comes when it is first written.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#endif
  return result;
}

}  // namespace hyperrouter
