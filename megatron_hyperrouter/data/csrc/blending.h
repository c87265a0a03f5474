// Which data set each sample of a blend comes from: always the one that is furthest behind its share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace hyperrouter {

// Shares and counts of the data sets still in the blend, padded to whole lanes with sets that are never picked.
class Blender {
 public:
  explicit Blender(const std::vector<double>& weights) : sets_(static_cast<int>(weights.size())), weights_(weights) {
    for (int i = 0; i < sets_; ++i) ids_.push_back(i);
    counts_.assign(weights.size(), 0.0);
    pad();
  }

  // The first set with the largest weight * max(sample, 1) - count.
  int pick(int64_t sample) const {
    const double time = sample > 1 ? static_cast<double>(sample) : 1.0;
    return sets_ <= kFew ? pick_of_few(time) : pick_of_many(time);
  }

  int id(int i) const { return ids_[i]; }
  int64_t count(int i) const { return static_cast<int64_t>(counts_[i]); }
  void take(int i) { counts_[i] += 1.0; }

  // Leaves out a set for good; the others keep their order, which decides ties.
  void drop(int i) {
    --sets_;
    ids_.erase(ids_.begin() + i);
    weights_.erase(weights_.begin() + i);
    counts_.erase(counts_.begin() + i);
    pad();
  }

 private:
  static constexpr int kFew = 64;    // up to here a plain scan is the fastest (measured)
  static constexpr int kLanes = 8;   // independent maxima, so that compilers make vector instructions of them
  static constexpr int kGroup = 32;  // whole lanes

  int pick_of_few(double time) const {
    const double *weights = weights_.data(), *counts = counts_.data();
    int where = 0;
    double most = weights[0] * time - counts[0];
    for (int i = 1; i < sets_; ++i) {
      const double behind = weights[i] * time - counts[i];
      if (behind > most) {
        most = behind;
        where = i;
      }
    }
    return where;
  }

  int pick_of_many(double time) const {
    const double *weights = weights_.data(), *counts = counts_.data();
    const int padded = static_cast<int>(weights_.size());
    double most = -std::numeric_limits<double>::infinity();
    int where = 0;  // only the group of the maximum is searched for it, set by set
    for (int group = 0; group < padded; group += kGroup) {
      const int end = std::min(padded, group + kGroup);
      double best[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) best[lane] = -std::numeric_limits<double>::infinity();
      for (int i = group; i < end; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          best[lane] = std::max(best[lane], weights[i + lane] * time - counts[i + lane]);
        }
      }
      const double highest = *std::max_element(best, best + kLanes);
      if (highest > most) {
        most = highest;
        where = group;
      }
    }
    while (weights[where] * time - counts[where] != most) ++where;
    return where;
  }

  void pad() {
    const std::size_t padded = (sets_ + kLanes - 1) / kLanes * kLanes;
    weights_.resize(sets_);
    counts_.resize(sets_);
    weights_.resize(padded, 0.0);
    counts_.resize(padded, std::numeric_limits<double>::infinity());
  }

  int sets_;
  std::vector<int> ids_;
  std::vector<double> weights_, counts_;  // counts are whole numbers below 2**53
};

// Fills set[size] and sample[size]: sample t of the blend is number sample[t] of set[t].
inline void blending_indices(const std::vector<double>& weights, int64_t size, int16_t* set, int64_t* sample) {
  Blender blender(weights);
  for (int64_t t = 0; t < size; ++t) {
    const int i = blender.pick(t);
    set[t] = static_cast<int16_t>(i);
    sample[t] = blender.count(i);
    blender.take(i);
  }
}

// The same with exactly sizes[i] samples of set i; the arrays hold as many elements as the sizes add up to, `total`.
inline void exhaustive_blending_indices(const std::vector<int64_t>& sizes, int64_t total, int16_t* set,
                                        int64_t* sample) {
  std::vector<double> weights;
  for (const int64_t size : sizes) weights.push_back(static_cast<double>(size) / static_cast<double>(total));
  Blender blender(weights);
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    if (sizes[i] == 0) blender.drop(i);
  }
  for (int64_t t = 0; t < total; ++t) {
    const int i = blender.pick(t);
    const int id = blender.id(i);
    set[t] = static_cast<int16_t>(id);
    sample[t] = blender.count(i);
    blender.take(i);
    if (blender.count(i) == sizes[id]) blender.drop(i);
  }
}

}  // namespace hyperrouter
