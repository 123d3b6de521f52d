#include "dispatch.h"

#include "kernels.h"
#include "sm90/matmul.h"
#include "sm90/pack.h"
#include "sm90/sddmm.h"

namespace jax_blocksparse {
namespace {

struct Device {
  int sm_count = 0;
  int major = 0;
};

cudaError_t CurrentDevice(Device* found) {
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&found->sm_count, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  return cudaDeviceGetAttribute(&found->major, cudaDevAttrComputeCapabilityMajor, device);
}

// The mma.sync kernels; the rest is plain FMA.
bool UsesTensorCores(ElementType type, int block) { return Is16Bit(type) && block >= 16; }

// The Hopper kernel takes 9 us however little there is to do; these take 4 to 6 for up to four blocks an SM.
bool IsSmallSddmm(const SddmmParams& p, const Device& device) {
  return UsesTensorCores(p.type, p.block) && p.tokens <= 256 &&
         SddmmMmaCtas(p, TileSize::kSmall) <= std::int64_t{4} * device.sm_count;
}

// Large tiles reuse more, but only if there are enough of them for every SM.
TileSize ChooseTileSize(std::int64_t large_ctas, int sm_count) {
  return large_ctas < sm_count ? TileSize::kSmall : TileSize::kLarge;
}

sm90::MatmulParams HopperParams(const MatmulParams& p, const MatmulPlan& plan, const Epilogue& epilogue,
                                const Device& device) {
  const bool packs = plan.workspace != nullptr;
  sm90::MatmulParams to;
  to.x = p.x;
  to.data = packs ? plan.workspace : p.data;
  to.tiles = plan.plan + plan.layout.tiles;
  to.steps = plan.plan + plan.layout.steps;
  to.masks = plan.plan + plan.layout.masks;
  to.y = p.y;
  to.batch = p.batch;
  to.x_batch = p.x_batch_stride == 0 ? 1 : p.batch;
  to.data_batch = p.data_batch_stride == 0 && (!packs || plan.batch == 1) ? 1 : p.batch;
  to.plan_batch_stride = plan.batch == 1 ? 0 : plan.layout.size;
  to.tokens = p.tokens;
  to.in_features = p.in_features;
  to.out_features = p.out_features;
  to.nnz = p.nnz;
  to.block = p.block;
  to.tile_features = plan.tile_features;
  to.max_steps = static_cast<std::int32_t>(plan.layout.max_steps);
  to.capacity = plan.capacity;
  to.sms = device.sm_count;
  to.type = p.type;
  // Packing makes one of the other: of small blocks what suits both, of float ones the transposed.
  to.transpose = packs ? p.type == ElementType::kF32 : p.transpose;
  to.f32_output = p.f32_output;
  to.epilogue = epilogue;
  return to;
}

sm90::SddmmParams HopperParams(const SddmmParams& p, const SddmmPlan& plan) {
  sm90::SddmmParams to;
  to.x = p.x;
  to.dy = p.dy;
  to.tiles = plan.plan + plan.layout.tiles;
  to.slabs = plan.plan + plan.layout.slabs;
  to.slots = plan.plan + plan.layout.slots;
  to.order = plan.plan + plan.layout.order;
  to.places = plan.plan + plan.layout.places;
  to.data = p.data;
  to.batch = p.batch;
  to.x_batch = p.x_batch_stride == 0 ? 1 : p.batch;
  to.dy_batch = p.dy_batch_stride == 0 ? 1 : p.batch;
  to.plan_batch_stride = plan.batch == 1 ? 0 : plan.layout.size;
  to.tokens = p.tokens;
  to.in_features = p.in_features;
  to.out_features = p.out_features;
  to.nnz = p.nnz;
  to.block = p.block;
  to.unit = plan.unit;
  to.plan_tiles = static_cast<std::int32_t>(plan.layout.plan_tiles);
  to.plan_units = static_cast<std::int32_t>(plan.layout.plan_units);
  to.split = plan.split;
  to.type = p.type;
  to.f32_output = p.f32_output;
  return to;
}

sm90::PackParams PackingFor(const MatmulParams& p, const MatmulPlan& plan, const sm90::MatmulParams& product) {
  sm90::PackParams to;
  to.data = p.data;
  to.order = plan.plan + plan.layout.order;
  to.inner = p.inner;
  to.packed = plan.workspace;
  to.batch = product.data_batch;
  to.data_batch_stride = p.data_batch_stride;
  to.order_batch_stride = product.plan_batch_stride;
  to.inner_batch_stride = p.order_batch_stride;
  to.in_features = p.in_features;
  to.nnz = p.nnz;
  to.block = p.block;
  to.transpose = p.transpose;
  return to;
}

cudaError_t LaunchMatmulSkinny(const MatmulParams& params, const Epilogue& epilogue, void* packed_x,
                               const Device& device, cudaStream_t stream) {
  const bool has_clusters = device.major == 9;
  return params.type == ElementType::kBF16
             ? LaunchMatmulSkinnyBF16(params, epilogue, packed_x, has_clusters, device.sm_count, stream)
             : LaunchMatmulSkinnyF16(params, epilogue, packed_x, has_clusters, device.sm_count, stream);
}

cudaError_t LaunchPack(const sm90::PackParams& params, ElementType type, cudaStream_t stream) {
  return Is16Bit(type) ? sm90::LaunchPack(params, stream) : sm90::LaunchPackTF32(params, stream);
}

cudaError_t LaunchHopper(const sm90::MatmulParams& params, cudaStream_t stream) {
  if (params.type == ElementType::kF32) return sm90::LaunchMatmulTF32(params, stream);
  return params.type == ElementType::kBF16 ? sm90::LaunchMatmulBF16(params, stream)
                                           : sm90::LaunchMatmulF16(params, stream);
}

cudaError_t LaunchHopper(const sm90::SddmmParams& params, cudaStream_t stream) {
  if (params.type == ElementType::kF32) return sm90::LaunchSddmmTF32(params, stream);
  return params.type == ElementType::kBF16 ? sm90::LaunchSddmmBF16(params, stream)
                                           : sm90::LaunchSddmmF16(params, stream);
}

// Says in `is_finished` whether the kernel has applied the epilogue.
cudaError_t RunProduct(const MatmulParams& params, const MatmulPlan& plan, const Epilogue& epilogue, bool* is_finished,
                       cudaStream_t stream) {
  if (CanLaunchMatmulTiny(params, epilogue)) {
    *is_finished = true;
    return LaunchMatmulTiny(params, epilogue, stream);
  }
  *is_finished = epilogue.IsIdentity();
  if (!Is16Bit(params.type) && !params.tf32) return LaunchMatmulSimt(params, stream);
  Device device;
  if (const cudaError_t error = CurrentDevice(&device); error != cudaSuccess) return error;

  // Few tokens: the time goes into reading the blocks, which wants neither an order nor a tile.
  const bool is_small_batch = params.tokens <= kFewTokens;
  const auto launch_skinny = [&] {
    const bool fuses = epilogue.column_sums == nullptr;
    *is_finished |= fuses;
    return LaunchMatmulSkinny(params, fuses ? epilogue : Epilogue{}, is_small_batch ? plan.workspace : nullptr, device,
                              stream);
  };
  if (is_small_batch && CanLaunchMatmulSkinny(params)) return launch_skinny();
  if (!is_small_batch && device.major == 9 && plan.plan != nullptr) {
    const bool fuses = !params.f32_output;
    const sm90::MatmulParams product = HopperParams(params, plan, fuses ? epilogue : Epilogue{}, device);
    if (sm90::CanLaunchMatmul(product)) {
      *is_finished |= fuses;
      if (plan.workspace != nullptr) {
        const cudaError_t error = LaunchPack(PackingFor(params, plan, product), params.type, stream);
        if (error != cudaSuccess) return error;
      }
      return LaunchHopper(product, stream);
    }
  }

  // Ahead of the kernels below even where it reads the weights twice: on an H100 1.2 to 4 times at 128 tokens, except
  // for the sparsest blocks of 128.
  if (params.tokens <= 128 && CanLaunchMatmulSkinny(params)) return launch_skinny();
  if (!UsesTensorCores(params.type, params.block)) return LaunchMatmulSimt(params, stream);
  // Half of a large tile would be empty up to 64 tokens.
  const TileSize size =
      is_small_batch ? TileSize::kSmall : ChooseTileSize(MatmulMmaCtas(params, TileSize::kLarge), device.sm_count);
  return params.type == ElementType::kBF16 ? LaunchMatmulMmaBF16(params, size, stream)
                                           : LaunchMatmulMmaF16(params, size, stream);
}

}  // namespace

cudaError_t Run(const MatmulParams& params, const MatmulPlan& plan, const Epilogue& epilogue, cudaStream_t stream) {
  bool is_finished;
  const cudaError_t error = RunProduct(params, plan, epilogue, &is_finished, stream);
  return error != cudaSuccess || is_finished ? error : LaunchEpilogue(params, epilogue, stream);
}

cudaError_t Run(const SddmmParams& params, const SddmmPlan& plan, cudaStream_t stream) {
  if (CanLaunchSddmmTiny(params)) return LaunchSddmmTiny(params, stream);
  if (!Is16Bit(params.type) && !params.tf32) return LaunchSddmmSimt(params, stream);
  Device device;
  if (const cudaError_t error = CurrentDevice(&device); error != cudaSuccess) return error;

  if (device.major == 9 && !IsSmallSddmm(params, device)) {
    const sm90::SddmmParams product = HopperParams(params, plan);
    if (sm90::CanLaunchSddmm(product)) {
      return LaunchHopper(product, stream);
    }
  }

  if (!UsesTensorCores(params.type, params.block)) return LaunchSddmmSimt(params, stream);
  const TileSize size = ChooseTileSize(SddmmMmaCtas(params, TileSize::kLarge), device.sm_count);
  return params.type == ElementType::kBF16 ? LaunchSddmmMmaBF16(params, size, stream)
                                           : LaunchSddmmMmaF16(params, size, stream);
}

}  // namespace jax_blocksparse
