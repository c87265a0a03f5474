// Which data set each sample of a blend comes from: always the one that is furthest behind its share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace hyperrouter {

// The largest of weights[i] * time - counts[i]; `size` is a multiple of kLanes.
constexpr std::size_t kLanes = 4;

inline double furthest_behind(const double* weights, const double* counts, std::size_t size, double time) {
#ifdef __SSE2__  // written out, because compilers make no maxpd of std::max
  const __m128d times = _mm_set1_pd(time);
  const auto behind = [&](std::size_t i) {
    return _mm_sub_pd(_mm_mul_pd(_mm_loadu_pd(weights + i), times), _mm_loadu_pd(counts + i));
  };
  __m128d even = behind(0), odd = behind(2);
  for (std::size_t i = kLanes; i < size; i += kLanes) {
    even = _mm_max_pd(even, behind(i));
    odd = _mm_max_pd(odd, behind(i + 2));
  }
  even = _mm_max_pd(even, odd);
  return _mm_cvtsd_f64(_mm_max_sd(even, _mm_unpackhi_pd(even, even)));
#else
  double best[kLanes];
  for (std::size_t lane = 0; lane < kLanes; ++lane) best[lane] = weights[lane] * time - counts[lane];
  for (std::size_t i = kLanes; i < size; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      best[lane] = std::max(best[lane], weights[i + lane] * time - counts[i + lane]);
    }
  }
  return *std::max_element(best, best + kLanes);
#endif
}

// Sets with their weights and counts, padded to whole lanes with sets that are never furthest behind.
class Shares {
 public:
  explicit Shares(std::size_t most) : sets_(most + kLanes), weights_(most + kLanes), counts_(most + kLanes) {}

  std::size_t size() const { return size_; }
  int set(std::size_t i) const { return sets_[i]; }
  double behind(std::size_t i, double time) const { return weights_[i] * time - counts_[i]; }
  double most_behind(double time) const { return furthest_behind(weights_.data(), counts_.data(), padded_, time); }

  // The first that is `most` behind, as most_behind() found it.
  std::size_t first(double most, double time) const {
    std::size_t i = 0;
    while (behind(i, time) != most) ++i;
    return i;
  }

  // One sample of set i; returns how many it gave before.
  int64_t take(std::size_t i) {
    const double before = counts_[i];
    counts_[i] = before + 1.0;
    return static_cast<int64_t>(before);
  }

  // Becomes the sets of `all`, named by their places there, that are at least that far behind at that time.
  void choose(const Shares& all, double least, double time) {
    size_ = 0;
    for (std::size_t i = 0; i < all.size_;
         ++i) {  // written without a branch, which would be mispredicted half of the time
      sets_[size_] = static_cast<int>(i);
      weights_[size_] = all.weights_[i];
      counts_[size_] = all.counts_[i];
      size_ += all.behind(i, time) >= least;
    }
    pad();
  }

  void add(int set, double weight) {
    sets_[size_] = set;
    weights_[size_] = weight;
    counts_[size_++] = 0.0;
    pad();
  }

  void drop(std::size_t i) {
    std::copy(sets_.begin() + i + 1, sets_.begin() + size_, sets_.begin() + i);
    std::copy(weights_.begin() + i + 1, weights_.begin() + size_, weights_.begin() + i);
    std::copy(counts_.begin() + i + 1, counts_.begin() + size_, counts_.begin() + i);
    --size_;
    pad();
  }

 private:
  void pad() {
    padded_ = (size_ + kLanes - 1) / kLanes * kLanes;
    std::fill(weights_.begin() + size_, weights_.begin() + padded_, 0.0);
    std::fill(counts_.begin() + size_, counts_.begin() + padded_, std::numeric_limits<double>::infinity());
  }

  std::size_t size_ = 0, padded_ = 0;
  std::vector<int> sets_;
  std::vector<double> weights_, counts_;  // counts are whole numbers below 2**53
};

// Which set is furthest behind its share, by weight * time - count.
//
// It is sought among a few candidates: the sets that can get above a floor before a horizon. As soon as the best of
// them is not above that floor, or the horizon is reached, all sets are looked at again. So the choice is exactly that
// of a scan of all sets, at the cost of a scan of a few.
class Blender {
 public:
  explicit Blender(const std::vector<double>& weights) : all_(weights.size()), few_(weights.size()) {
    for (std::size_t i = 0; i < weights.size(); ++i) all_.add(static_cast<int>(i), weights[i]);
    heaviest_ = *std::max_element(weights.begin(), weights.end());
  }

  // The first set with the largest weight * max(sample, 1) - count gives one: returns it and the number of its sample.
  std::pair<int, int64_t> take(int64_t sample) {
    const double time = sample > 1 ? static_cast<double>(sample) : 1.0;
    if (!(time < horizon_)) look_again(time);
    double most = few_.most_behind(time);
    while (!(most > floor_)) {
      depth_ *= kDeeper;
      look_again(time);
      most = few_.most_behind(time);
    }
    const std::size_t candidate = few_.first(most, time);
    last_ = few_.set(candidate);
    few_.take(candidate);
    return {all_.set(last_), all_.take(last_)};
  }

  // Leaves out set number i of those that are left; they keep their order, which decides ties.
  void drop(std::size_t i) {
    all_.drop(i);
    horizon_ = 0;
  }

  // The same for the set that gave the last sample.
  void drop_last() { drop(last_); }

 private:
  static constexpr std::size_t kFew = 16;     // up to here all are candidates
  static constexpr double kPerStep = 6;       // sets for each step to the horizon (measured)
  static constexpr double kDeeper = 1.5;      // the floor was too high
  static constexpr double kShallower = 0.95;  // it was not
  static constexpr double kShallowest = 1.0 / 64;
  static constexpr double kRounding = 1.0 / (int64_t{1} << 48);  // of the largest number below: 16 times what is needed
  static constexpr double kForever = std::numeric_limits<double>::infinity();

  void look_again(double time) {
    const bool few = all_.size() <= kFew;
    const double steps = few ? kForever : std::max(4.0, static_cast<double>(all_.size()) / kPerStep);
    horizon_ = time + steps;
    depth_ = std::max(depth_ * kShallower, kShallowest);
    const double rounding = kRounding * horizon_ * std::max(heaviest_, 1.0);
    const bool everything = few || !(rounding < depth_ / 4);
    // Until the horizon a set that is left out stays below `least`, and so, as computed, below the floor.
    const double least = everything ? -kForever : all_.most_behind(time) - depth_;
    floor_ = everything ? -kForever : least + rounding;
    few_.choose(all_, least, everything ? time : horizon_);
  }

  Shares all_;  // set(i) is the number that the caller knows it by
  Shares few_;  // set(i) is its place in all_
  int last_ = 0;
  double heaviest_, horizon_ = 0, floor_ = 0, depth_ = 0.5;
};

// Fills set[size] and sample[size]: sample t of the blend is number sample[t] of set[t].
inline void blending_indices(const std::vector<double>& weights, int64_t size, int16_t* set, int64_t* sample) {
  Blender blender(weights);
  for (int64_t t = 0; t < size; ++t) {
    const auto [chosen, number] = blender.take(t);
    set[t] = static_cast<int16_t>(chosen);
    sample[t] = number;
  }
}

// The same with exactly sizes[i] samples of set i; the arrays hold as many elements as the sizes add up to, `total`.
inline void exhaustive_blending_indices(const std::vector<int64_t>& sizes, int64_t total, int16_t* set,
                                        int64_t* sample) {
  std::vector<double> weights;
  for (const int64_t size : sizes) weights.push_back(static_cast<double>(size) / static_cast<double>(total));
  Blender blender(weights);
  for (std::size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] == 0) blender.drop(i);
  }
  for (int64_t t = 0; t < total; ++t) {
    const auto [chosen, number] = blender.take(t);
    set[t] = static_cast<int16_t>(chosen);
    sample[t] = number;
    if (number + 1 == sizes[chosen]) blender.drop_last();
  }
}

}  // namespace hyperrouter
