// Where each sample begins: documents laid end to end, cut every seq_length tokens.
#pragma once

#include <algorithm>
#include <cstdint>
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

// Fills out[2 * (num_samples + 1)] with (position in `order`, token in that document).
//
// Row k stands at token b = k * seq_length, in the document that holds token b + extra - 1: the last one that sample k
// - 1 reads. Where the last sample is shorter than the others, the last row ends it at the last token there is. Throws
// std::out_of_range for an id outside `sizes`, std::invalid_argument for a negative size or too few tokens.
template <typename Out, typename Document>
void sample_index(View<int32_t> sizes, View<Document> order, const SampleCut& cut, Out* out) {
  // Lookups in `sizes` are in random order and miss every cache; asking this far ahead hides most of the wait.
  constexpr int64_t kAhead = 24;
  const int64_t documents = order.size();
  int64_t row = 1, boundary = cut.seq_length, before = 0;  // before: tokens of the documents passed
  int64_t last_filled = 0, last_size = 0, final_size = 0;
  out[0] = out[1] = 0;
  for (int64_t i = 0; i < documents && row <= cut.num_samples; ++i) {
    if (i + kAhead < documents) __builtin_prefetch(sizes.address(static_cast<int64_t>(order[i + kAhead])));
    const int64_t id = order[i];
    if (id < 0 || id >= sizes.size()) {
      throw std::out_of_range("document_index[" + std::to_string(i) + "] = " + std::to_string(id) + ", but there are " +
                              std::to_string(sizes.size()) + " documents");
    }
    const int64_t size = sizes[id];
    if (size < 0)
      throw std::invalid_argument("sizes[" + std::to_string(id) + "] = " + std::to_string(size) + " is negative");
    const int64_t reach = before + size + 1 - cut.extra;  // rows below this many tokens end in this document
    for (; row <= cut.num_samples && boundary < reach; ++row, boundary += cut.seq_length) {
      out[2 * row] = static_cast<Out>(i);
      out[2 * row + 1] = static_cast<Out>(boundary - before);
    }
    before += size;
    final_size = size;
    if (size > 0) {
      last_filled = i;
      last_size = size;
    }
  }
  if (row > cut.num_samples) return;
  // Only a last sample that is shorter than the others can be left.
  if (row < cut.num_samples || before < cut.num_tokens) {
    throw std::invalid_argument("the documents of document_index hold " + std::to_string(before) + " tokens, not " +
                                std::to_string(cut.num_tokens));
  }
  // megatron-core ends in the last document even when that is empty; with an extra token that would be token -1 of it.
  const bool step_back = final_size < cut.extra;
  out[2 * row] = static_cast<Out>(step_back ? last_filled : documents - 1);
  out[2 * row + 1] = static_cast<Out>((step_back ? last_size : final_size) - cut.extra);
}

}  // namespace hyperrouter
