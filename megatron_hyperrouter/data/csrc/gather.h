// One sample copied out of the memory-mapped tokens of its documents.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "view.h"

namespace hyperrouter {

// Documents order[first] from token `begin` on, ..., order[last] up to token `end` (not included).
struct Span {
  int64_t first, begin, last, end;
};

// Copies the span into out[length], which it must fill exactly.
// Returns the first position of an id outside 0 .. limit - 1, or -1.  Throws std::out_of_range rather than leave a
// document.
template <typename Token, typename Document>
int64_t gather(View<Token> tokens, View<int64_t> pointers, View<int32_t> sizes, View<Document> order, const Span& span,
               int64_t limit, int64_t* out, int64_t length) {
  const auto refuse = [](const std::string& what) { throw std::out_of_range(what); };
  if (span.first < 0 || span.first > span.last || span.last >= order.size()) {
    refuse("document_index has " + std::to_string(order.size()) + " entries, but entries " +
           std::to_string(span.first) + " to " + std::to_string(span.last) + " are requested");
  }
  int64_t filled = 0;
  Token lowest = 0, highest = 0;
  for (int64_t i = span.first; i <= span.last; ++i) {
    const int64_t id = order[i];
    if (id < 0 || id >= sizes.size() || id >= pointers.size())
      refuse("document " + std::to_string(id) + " is out of range: there are " + std::to_string(sizes.size()) +
             " documents");
    const int64_t size = sizes[id], pointer = pointers[id], start = pointer / static_cast<int64_t>(sizeof(Token));
    const int64_t begin = i == span.first ? span.begin : 0, end = i == span.last ? span.end : size;
    if (begin < 0 || begin > end || end > size || pointer < 0 || start > tokens.size() - size) {
      refuse("document " + std::to_string(id) + " has " + std::to_string(size) + " tokens, but tokens " +
             std::to_string(begin) + " to " + std::to_string(end) + " are requested");
    }
    if (end - begin > length - filled)
      refuse("the sample has more than " + std::to_string(length) + " tokens, the size of out");
    for (int64_t token = start + begin; token < start + end; ++token) {
      const Token value = tokens[token];
      lowest = value < lowest ? value : lowest;
      highest = value > highest ? value : highest;
      out[filled++] = static_cast<int64_t>(value);
    }
  }
  if (filled != length)
    refuse("the sample has " + std::to_string(filled) + " tokens, but the size of out is " + std::to_string(length));
  if (!length || (static_cast<int64_t>(lowest) >= 0 && static_cast<int64_t>(highest) < limit)) return -1;
  int64_t bad = 0;
  while (out[bad] >= 0 && out[bad] < limit) ++bad;
  return bad;
}

}  // namespace hyperrouter
