// SPDX-License-Identifier: Apache-2.0
// what the kernels use of HIP's headers
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
struct Thread {
    struct X { __device__ operator int() const { return __builtin_amdgcn_workitem_id_x(); } } x;
};
struct Block {
    struct X { __device__ operator int() const { return __builtin_amdgcn_workgroup_id_x(); } } x;
    struct Y { __device__ operator int() const { return __builtin_amdgcn_workgroup_id_y(); } } y;
};
#define threadIdx (Thread{})
#define blockIdx (Block{})
union Bits { uint32_t i; float f; };
static __device__ __forceinline__ float widened(unsigned short bits) {
    Bits x;
    x.i = (uint32_t)bits << 16;
    return x.f;
}
static __device__ __forceinline__ unsigned short rounded(float f) {
    Bits x;
    x.f = f;
    return f != f ? 0x7fff : (x.i + 0x7fff + (x.i >> 16 & 1)) >> 16;
}
struct __hip_bfloat16 { unsigned short bits; };
static __device__ __forceinline__ float __bfloat162float(__hip_bfloat16 x) { return widened(x.bits); }
static __device__ __forceinline__ __hip_bfloat16 __float2bfloat16(float x) { return {rounded(x)}; }
struct hip_bfloat16 {
    unsigned short bits;
    __device__ hip_bfloat16() {}
    explicit __device__ hip_bfloat16(float x) : bits(rounded(x)) {}
    __device__ operator float() const { return widened(bits); }
};
extern "C" __device__ float __ocml_exp_f32(float);
static __device__ __forceinline__ float expf(float x) { return __ocml_exp_f32(x); }
static __device__ __forceinline__ float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
