// Where each sample begins: documents laid end to end, cut every seq_length tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "view.h"

namespace hyperrouter {

struct SampleCut {
  int64_t seq_length;   // tokens from one sample's start to the next one's
  int64_t num_samples;  // rows to write, besides the row that ends the last sample
  int64_t num_tokens;   // tokens in all documents of the order
  int64_t extra;        // 1: a sample reads one token of the next one, as its last label; else 0
};

// A copy of `sizes` in half the room, or none where a size does not fit or where the copy would not pay.
//
// Lookups are in random order, so each waits for memory; 20 MB stay in a cache that 40 MB leave.
inline std::unique_ptr<uint16_t[]> narrowed(View<int32_t> sizes, int64_t lookups) {
  constexpr int64_t kLeast = 1 << 18, kMost = 1 << 25;
  if (sizes.size() < kLeast || sizes.size() > kMost || lookups < sizes.size() / 2) return nullptr;
  std::unique_ptr<uint16_t[]> copy(new (std::nothrow) uint16_t[static_cast<std::size_t>(sizes.size())]);
  if (!copy) return nullptr;
  uint32_t all = 0;  // the bits of all sizes
  for (int64_t i = 0; i < sizes.size(); ++i) {
    const auto size = static_cast<uint32_t>(sizes[i]);
    all |= size;
    copy[i] = static_cast<uint16_t>(size);
  }
  if (all > std::numeric_limits<uint16_t>::max()) return nullptr;
  return copy;
}

// Sizes of the documents at `begin` to `end` of the order. Throws as sample_index does.
template <typename Size, typename Document>
void look_up(View<Size> sizes, View<Document> order, int64_t begin, int64_t end, Size* found) {
  constexpr int64_t kAhead = 24;  // asking this far ahead hides most of the wait
  const int64_t last = order.size() - 1;
  for (int64_t i = begin; i < end; ++i) {
    sizes.prefetch(order[std::min(i + kAhead, last)]);
    const int64_t id = order[i];
    if (id < 0 || id >= sizes.size()) {
      throw std::out_of_range("document_index[" + std::to_string(i) + "] = " + std::to_string(id) + ", but there are " +
                              std::to_string(sizes.size()) + " documents");
    }
    found[i - begin] = sizes[id];
    if (found[i - begin] < 0) {
      throw std::invalid_argument("sizes[" + std::to_string(id) + "] = " + std::to_string(found[i - begin]) +
                                  " is negative");
    }
  }
}

template <typename Out, typename Size, typename Document>
void cut_samples(View<Size> sizes, View<Document> order, const SampleCut& cut, Out* out) {
  // Documents are looked up some at a time, apart from cutting: a wrong guess of a branch there would drop the lookups
  // that are under way.
  constexpr int64_t kBlock = 1024;
  Size found[kBlock];
  const int64_t documents = order.size();
  int64_t row = 1, before = 0;    // before: tokens of the documents passed
  int64_t left = cut.seq_length;  // from the beginning of the next document to the boundary of `row`
  out[0] = out[1] = 0;
  for (int64_t begin = 0; begin < documents && row <= cut.num_samples; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, documents);
    look_up(sizes, order, begin, end, found);
    for (int64_t i = begin; i < end && row <= cut.num_samples; ++i) {
      const int64_t reach = int64_t{found[i - begin]} + 1 - cut.extra;  // boundaries below it belong to this document
      do {
        // Written whether or not the row begins here: if not, the next document overwrites it.
        out[2 * row] = static_cast<Out>(i);
        out[2 * row + 1] = static_cast<Out>(left);
        const bool begins = left < reach;
        row += begins;
        left += begins ? cut.seq_length : 0;
      } while (left < reach && row <= cut.num_samples);
      left -= found[i - begin];
      before += found[i - begin];
    }
  }
  if (row > cut.num_samples) return;
  // Only a last sample that is shorter than the others can be left.
  if (documents == 0 || row < cut.num_samples || before < std::max(cut.num_tokens, cut.extra)) {
    throw std::invalid_argument("the documents in document_index have " + std::to_string(before) +
                                " tokens in total, but num_tokens is " + std::to_string(cut.num_tokens));
  }
  // megatron-core ends in the last document even when that is empty; with an extra token that would be token -1 of it.
  int64_t last = documents - 1;
  while (sizes[order[last]] < cut.extra) --last;
  out[2 * row] = static_cast<Out>(last);
  out[2 * row + 1] = static_cast<Out>(sizes[order[last]] - cut.extra);
}

// Fills out[2 * (num_samples + 1)] with (position in `order`, token in that document).
//
// Row k stands at token b = k * seq_length, in the document that holds token b + extra - 1: the last one that sample k
// - 1 reads. Where the last sample is shorter than the others, the last row ends it at the last token there is. Throws
// std::out_of_range for an id outside `sizes`, std::invalid_argument for a negative size or too few tokens.
template <typename Out, typename Document>
void sample_index(View<int32_t> sizes, View<Document> order, const SampleCut& cut, Out* out) {
  const std::unique_ptr<uint16_t[]> narrow = narrowed(sizes, order.size());
  if (narrow) {
    cut_samples(View<uint16_t>(narrow.get(), sizes.size()), order, cut, out);
  } else {
    cut_samples(sizes, order, cut, out);
  }
}

}  // namespace hyperrouter
