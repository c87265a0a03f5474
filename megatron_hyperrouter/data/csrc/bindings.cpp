// The Python module megatron_hyperrouter.data._index.  Its twin in NumPy, with the same numbers, is _numpy_index.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "blending.h"
#include "gather.h"
#include "pages.h"
#include "permutation.h"
#include "sample_index.h"
#include "shuffle.h"
#include "view.h"

namespace py = pybind11;

namespace hyperrouter {
namespace {

// Arguments marked noconvert() take this very type and layout: a silent copy of 100 MB would cost more than the work.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
View<T> view(const Array<T>& array, const char* name) {
  if (array.ndim() != 1) {
    throw std::invalid_argument(std::string(name) + " must have 1 dimension, got " + std::to_string(array.ndim()));
  }
  return View<T>(array.data(), array.size());
}

template <typename Out, typename Document>
py::array build_sample_index(View<int32_t> sizes, View<Document> order, const SampleCut& cut) {
  if (cut.num_samples > int64_t{1} << 60) throw std::bad_alloc();
  std::unique_ptr<Out[]> rows;
  {
    const py::gil_scoped_release released;
    rows = unfilled<Out>(2 * (cut.num_samples + 1));
    sample_index(sizes, order, cut, rows.get());
  }
  const py::capsule owner(rows.get(), [](void* data) { delete[] static_cast<Out*>(data); });
  return Array<Out>({static_cast<py::ssize_t>(cut.num_samples + 1), static_cast<py::ssize_t>(2)}, rows.release(),
                    owner);
}

template <typename Document>
py::array bind_sample_index(const Array<int32_t>& sizes, const Array<Document>& order, int64_t seq_length,
                            int64_t num_samples, int64_t num_tokens, int64_t extra, bool wide) {
  if (seq_length < 1) throw std::invalid_argument("seq_length must be at least 1, got " + std::to_string(seq_length));
  if (num_samples < 0)
    throw std::invalid_argument("num_samples must be at least 0, got " + std::to_string(num_samples));
  if (extra != 0 && extra != 1) throw std::invalid_argument("extra must be 0 or 1, got " + std::to_string(extra));
  int64_t reach;
  if (__builtin_add_overflow(num_samples, 1, &reach) || __builtin_mul_overflow(reach, seq_length, &reach)) {
    throw std::invalid_argument("(num_samples + 1) * seq_length must be less than 2**63, got num_samples = " +
                                std::to_string(num_samples) + " and seq_length = " + std::to_string(seq_length));
  }
  if (!wide && order.size() > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("document_index has " + std::to_string(order.size()) +
                                " elements, but int32 rows allow at most 2**31 - 1; pass wide=True");
  }
  const SampleCut cut{seq_length, num_samples, num_tokens, extra};
  const auto sizes_view = view(sizes, "sizes");
  const auto order_view = view(order, "document_index");
  return wide ? build_sample_index<int64_t>(sizes_view, order_view, cut)
              : build_sample_index<int32_t>(sizes_view, order_view, cut);
}

template <typename T>
int bind_shuffle(Array<T>& values, Array<uint32_t>& key, int position) {
  if (values.ndim() != 1)
    throw std::invalid_argument("values must have 1 dimension, got " + std::to_string(values.ndim()));
  if (key.size() != MersenneTwister::kWords) {
    throw std::invalid_argument("key must have 624 elements, got " + std::to_string(key.size()));
  }
  T* data = values.mutable_data();
  uint32_t* words = key.mutable_data();
  const py::ssize_t size = values.size();
  const py::gil_scoped_release released;
  return shuffle(data, size, words, position);
}

constexpr std::size_t kMostSets = 32767;  // the set's number is an int16

template <typename T>
std::vector<T> shares(const Array<T>& values, const char* name) {
  const auto values_view = view(values, name);
  if (values.size() < 1 || static_cast<std::size_t>(values.size()) > kMostSets) {
    throw std::invalid_argument(std::string(name) + " must have 1 to 32767 elements, got " +
                                std::to_string(values.size()));
  }
  std::vector<T> result;
  for (int64_t i = 0; i < values_view.size(); ++i) result.push_back(values_view[i]);
  return result;
}

py::tuple bind_blending_indices(const Array<double>& weights, int64_t size) {
  const std::vector<double> wanted = shares(weights, "weights");
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (!std::isfinite(wanted[i]) || wanted[i] <= 0) {
      throw std::invalid_argument("weights[" + std::to_string(i) + "] must be finite and greater than 0, got " +
                                  std::to_string(wanted[i]));
    }
  }
  if (size < 0) throw std::invalid_argument("size must be at least 0, got " + std::to_string(size));
  Array<int16_t> set(size);
  Array<int64_t> sample(size);
  int16_t* set_data = set.mutable_data();
  int64_t* sample_data = sample.mutable_data();
  {
    const py::gil_scoped_release released;
    blending_indices(wanted, size, set_data, sample_data);
  }
  return py::make_tuple(set, sample);
}

py::tuple bind_exhaustive_blending_indices(const Array<int64_t>& sizes) {
  const std::vector<int64_t> wanted = shares(sizes, "sizes");
  int64_t total = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i] < 0 || __builtin_add_overflow(total, wanted[i], &total)) {
      throw std::invalid_argument("sizes[" + std::to_string(i) + "] = " + std::to_string(wanted[i]) +
                                  ": each size must be at least 0, and the sum of all sizes must be less than 2**63");
    }
  }
  Array<int16_t> set(total);
  Array<int64_t> sample(total);
  int16_t* set_data = set.mutable_data();
  int64_t* sample_data = sample.mutable_data();
  {
    const py::gil_scoped_release released;
    exhaustive_blending_indices(wanted, total, set_data, sample_data);
  }
  return py::make_tuple(set, sample);
}

template <typename Token, typename Document>
int64_t bind_gather(const Array<Token>& tokens, const Array<int64_t>& pointers, const Array<int32_t>& sizes,
                    const Array<Document>& order, int64_t first, int64_t begin, int64_t last, int64_t end,
                    int64_t limit, Array<int64_t>& out) {
  if (out.ndim() != 1) throw std::invalid_argument("out must have 1 dimension, got " + std::to_string(out.ndim()));
  const auto tokens_view = view(tokens, "tokens");
  const auto pointers_view = view(pointers, "pointers");
  const auto sizes_view = view(sizes, "sizes");
  const auto order_view = view(order, "document_index");
  int64_t* data = out.mutable_data();
  const py::ssize_t length = out.size();
  const py::gil_scoped_release released;
  return gather(tokens_view, pointers_view, sizes_view, order_view, Span{first, begin, last, end}, limit, data, length);
}

KeyedPermutation keyed_permutation(int64_t size, uint64_t key) {
  if (size < 1 || size > int64_t{1} << 62) {
    throw std::invalid_argument("size must be from 1 to 2**62, got " + std::to_string(size));
  }
  return KeyedPermutation(size, key);
}

int64_t bind_permuted(int64_t position, int64_t size, uint64_t key) {
  const KeyedPermutation permutation = keyed_permutation(size, key);
  if (position < 0 || position >= size) {
    throw std::out_of_range("position " + std::to_string(position) + " is out of range: the permutation has " +
                            std::to_string(size) + " elements");
  }
  return permutation(position);
}

py::array bind_permutation(int64_t size, uint64_t key) {
  const KeyedPermutation permutation = keyed_permutation(size, key);
  Array<int64_t> out(size);
  int64_t* data = out.mutable_data();
  {
    const py::gil_scoped_release released;
    for (int64_t i = 0; i < size; ++i) data[i] = permutation(i);
  }
  return std::move(out);
}

template <typename Document>
void define_sample_index(py::module_& module, const char* doc) {
  module.def("sample_index", &bind_sample_index<Document>, py::arg("sizes").noconvert(),
             py::arg("document_index").noconvert(), py::arg("seq_length"), py::arg("num_samples"),
             py::arg("num_tokens"), py::arg("extra"), py::arg("wide"), doc);
}

template <typename T>
void define_shuffle(py::module_& module, const char* doc) {
  module.def("shuffle", &bind_shuffle<T>, py::arg("values").noconvert(), py::arg("key").noconvert(),
             py::arg("position"), doc);
}

template <typename Token, typename Document>
void define_gather(py::module_& module, const char* doc) {
  module.def("gather", &bind_gather<Token, Document>, py::arg("tokens").noconvert(), py::arg("pointers").noconvert(),
             py::arg("sizes").noconvert(), py::arg("document_index").noconvert(), py::arg("first"), py::arg("begin"),
             py::arg("last"), py::arg("end"), py::arg("limit"), py::arg("out").noconvert(), doc);
}

template <typename Document, typename... Token>
void define_gathers(py::module_& module, const char* doc) {
  (define_gather<Token, Document>(module, doc), ...);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.doc() = "Indices of samples and blends, shuffling, and gathering of samples. Every function releases the GIL.";

  const char* sample_index_doc =
      "Return the place where each sample begins: rows (position in document_index, token in that document), "
      "[num_samples + 1, 2].\n\n"
      "sizes int32 [N]: number of tokens of each document.  document_index int32 or int64 [M]: the documents of all "
      "epochs in reading order.\n"
      "num_tokens: number of tokens of all documents in document_index.  extra: 1 if a sample reads one token more "
      "than seq_length, else 0.\n"
      "wide: return int64 rows instead of int32 rows.  The rows equal those of megatron-core 0.16 "
      "`build_sample_idx`.\n"
      "Raises IndexError if document_index names a document that does not exist.  Raises ValueError if a size is "
      "negative or the documents have too few tokens.";
  define_sample_index<int32_t>(module, sample_index_doc);
  define_sample_index<int64_t>(module, sample_index_doc);

  const char* shuffle_doc =
      "Shuffle values (int32, uint32 or int64 [N], N <= 2**32) in place, like numpy.random.RandomState.shuffle.\n\n"
      "key uint32 [624] and position are the state of the Mersenne Twister, as RandomState.get_state returns it.\n"
      "Changes key in place and returns the new position.  Raises ValueError if values has more elements, or if key "
      "and position are not such a state.";
  define_shuffle<int32_t>(module, shuffle_doc);
  define_shuffle<uint32_t>(module, shuffle_doc);
  define_shuffle<int64_t>(module, shuffle_doc);

  module.def("blending_indices", &bind_blending_indices, py::arg("weights").noconvert(), py::arg("size"),
             "Return, for each sample of a blend, its set (int16 [size]) and its number in that set (int64 [size]).\n\n"
             "weights float64 [sets], each greater than 0.  Sample t comes from the set with the largest value of\n"
             "weight * max(t, 1) - (number of samples taken from the set so far); from the first such set if several "
             "are equal.\n"
             "The result equals that of megatron-core 0.16 `build_blending_indices`.  Raises ValueError for other "
             "weights or more than 32767 sets.");
  module.def("exhaustive_blending_indices", &bind_exhaustive_blending_indices, py::arg("sizes").noconvert(),
             "Like blending_indices with weights sizes / sum(sizes), but take exactly sizes[i] samples from set i.\n\n"
             "sizes int64 [sets], each at least 0.  The result equals that of megatron-core 0.16\n"
             "`build_exhaustive_blending_indices`.  Raises ValueError for a negative size or more than 32767 sets.");

  module.def("permuted", &bind_permuted, py::arg("position"), py::arg("size"), py::arg("key"),
             "Return element `position` of the permutation of 0 .. size - 1 that `key` (uint64) selects.\n\n"
             "The same arguments always give the same element.  Raises ValueError if size is not from 1 to 2**62, and\n"
             "IndexError if position is not from 0 to size - 1.");
  module.def("permutation", &bind_permutation, py::arg("size"), py::arg("key"),
             "Return all elements of the permutation that `permuted` computes, in order: int64 [size].");

  const char* gather_doc =
      "Copy one sample into out (int64 [length]): the documents document_index[first] to document_index[last].\n"
      "The sample starts at token `begin` of the first document and ends before token `end` of the last one.\n\n"
      "tokens [all tokens]; pointers int64 [N] (in bytes) and sizes int32 [N] as in an .idx file.\n"
      "Returns the position in out of the first token id that is not from 0 to limit - 1, or -1 if there is none.\n"
      "Raises IndexError if the sample is not inside the documents, or does not have exactly `length` tokens.";
  // The usual ones first, since they are tried one after another.
  define_gathers<int32_t, uint16_t, int32_t>(module, gather_doc);
  define_gathers<int64_t, uint16_t, int32_t>(module, gather_doc);
  define_gathers<int32_t, uint8_t, int8_t, int16_t, int64_t>(module, gather_doc);
  define_gathers<int64_t, uint8_t, int8_t, int16_t, int64_t>(module, gather_doc);
}

}  // namespace hyperrouter
