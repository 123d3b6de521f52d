// How sampled products are launched: what the plan leaves open, chosen here, and the parameters of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../launch.cuh"
#include "sddmm_common.cuh"
#include "tensor_map.h"

namespace jax_blocksparse::sm90 {

constexpr int Log2(int value) { return value <= 1 ? 0 : 1 + Log2(value / 2); }

// The most stages of a ring. Those of large units that do not make copies faster let CTAs drift apart, which then find
// less in L2 of what others have read. Where tiles are so full that products bound them, one more helps.
inline int MostStages(const SddmmParams& params) {
  constexpr double kFull = 6.5;  // units of 64
  if (params.unit < 64) return kMaxStages;
  const bool full = params.unit == 64 && params.split == 1 && params.plan_units > kFull * params.plan_tiles;
  return full ? 5 : 4;
}

constexpr int kWaveCtas = 132;  // one for each SM of an H100

// The most CTAs of a launch. If CTAs start whenever others end, they are at other tokens than their neighbours, and
// read what they share from memory. With units of 64 that costs more than it takes to let a wave end before the next
// begins.
inline std::int64_t MostCtas(const SddmmParams& params) {
  constexpr int kManyTokens = 4096;          // that take tens of microseconds
  constexpr int kInOneWave = 8 * kWaveCtas;  // units: plans have room for more tiles than most patterns fill
  const bool in_waves = params.unit == 64 && params.tokens >= kManyTokens && params.plan_units > kInOneWave;
  return in_waves ? kWaveCtas : std::numeric_limits<int>::max();
}

// Whether clusters have two tiles. As in sddmm_layout.py, where plans give both tiles of a pair the same slabs of dy.
inline bool IsPaired(const SddmmParams& params, int unit) {
  // With few units in a tile, what a pair would save is less than what waiting for each other costs.
  constexpr int kLeastUnits = 132, kLeastIfShared = 1536;
  const std::int64_t units = params.plan_units;
  if (params.split == 1) return units > kLeastUnits;
  const bool sparse = 8 * units <= CeilDiv(params.in_features, unit) * CeilDiv(params.out_features, unit);
  const int at_once = params.split == 2 ? 60 : params.split == 4 ? 30 : 0;  // tiles, on an H100
  const bool in_one_wave = units <= at_once * SddmmCapacity(unit);
  return unit < 64 && sparse && in_one_wave && units > kLeastIfShared;
}

// Chooses the walk for units of 64 and 128, whose strips are columns of units: by how many features of x and dy a wave
// of CTAs needs, if the pattern is even. One strip after the other needs all of x for each wave.
inline TileWalk ChooseWalk(const SddmmParams& params, int unit, int at_once) {
  constexpr double kWave = kWaveCtas, kWorthwhile = 0.75;
  const double strips = static_cast<double>(CeilDiv(params.out_features, unit));
  const double tiles = std::floor(params.plan_tiles / strips / at_once) * at_once;  // of a strip
  if (unit < 64 || tiles <= at_once) return {};
  const auto features = [&](double together) {
    return together * unit + params.in_features * std::min(1.0, kWave / (together * tiles));
  };
  const double least = std::min(strips, std::ceil(kWave / tiles));
  const double best = std::max(least, std::sqrt(params.in_features * kWave / tiles / unit));
  const double together = std::ceil(strips / std::max(1.0, std::round(strips / best)));
  if (features(together) > kWorthwhile * features(least)) return {};
  return {static_cast<int>(together), static_cast<int>(tiles) / at_once};
}

template <typename T, typename Shape, auto kKernel>
cudaError_t LaunchSddmmShape(const SddmmParams& params, cudaStream_t stream) {
  constexpr CUtensorMapDataType kType = kFactorMapType<T>;
  const auto extent = [](std::int64_t size) { return static_cast<std::uint64_t>(size); };
  SddmmKernelParams p;
  cudaError_t error = EncodeTensorMap(&p.x, {params.x, kType, sizeof(T), extent(params.in_features),
                                             extent(params.tokens), extent(params.x_batch), Shape::kTokens});
  if (error != cudaSuccess) return error;
  TensorMapSpec dy = {
      params.dy,     kType, sizeof(T), extent(params.out_features), extent(params.tokens), extent(params.dy_batch),
      Shape::kTokens};
  dy.neighbours_follow = Shape::kUnit < 64;  // a tile needs most of a strip
  error = EncodeTensorMap(&p.dy, dy);
  if (error != cudaSuccess) return error;
  p.tiles = reinterpret_cast<const int4*>(params.tiles);
  p.slabs = params.slabs;
  p.slots = params.slots;
  p.order = params.order;
  p.places = params.places;
  p.data = params.data;
  p.plan_batch_stride = params.plan_batch_stride;
  p.plan_tiles = params.plan_tiles;
  p.plan_units = params.plan_units;
  p.split = params.split;
  p.most_stages = MostStages(params);
  p.paired = IsPaired(params, Shape::kUnit);
  const int at_once = p.paired ? 2 : 1;
  p.walk = ChooseWalk(params, Shape::kUnit, at_once);
  p.all_tiles = static_cast<int>(CeilDiv(params.plan_tiles, at_once)) * at_once;
  p.nnz = params.nnz;
  p.block_bits = Log2(params.block);
  p.ratio_bits = Log2(params.unit / params.block);
  p.chunks = static_cast<int>(CeilDiv(params.tokens, Shape::kTokens));
  p.x_shared = params.x_batch == 1;
  p.dy_shared = params.dy_batch == 1;
  p.f32_output = params.f32_output;

  if (error = AllowSharedMemory<kKernel>(kSharedBytes); error != cudaSuccess) return error;
  const int cluster_size = at_once * params.split;
  const std::int64_t clusters = params.batch * p.all_tiles / at_once;
  if (clusters * cluster_size > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = kSddmmThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const std::int64_t most = MostCtas(params) / cluster_size;
  for (std::int64_t first = 0; first < clusters && error == cudaSuccess; first += most) {
    p.first_cluster = static_cast<int>(first);
    config.gridDim = static_cast<unsigned>(std::min(most, clusters - first) * cluster_size);
    error = cudaLaunchKernelEx(&config, kKernel, p);
  }
  return error;
}

}  // namespace jax_blocksparse::sm90
