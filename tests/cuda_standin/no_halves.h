// The headers of types below 32 bits need parts of CUDA that the wheels do not bring. Those of cuBLAS and NCCL, which
// include them, only name the types. Include this first.
#pragma once
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __nv_bfloat16;
