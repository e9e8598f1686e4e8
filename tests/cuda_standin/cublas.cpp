// A stand-in for libcublas and libcublasLt: products are counted by precision and shape, and not computed.
#include "counts.h"
#include "no_halves.h"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <stdlib.h>
#include <string.h>

static thread_local cudaStream_t stream = nullptr;
static thread_local cublasMath_t math_mode = CUBLAS_DEFAULT_MATH;

static const cublasStatus_t OK = CUBLAS_STATUS_SUCCESS;

static std::string precision(cudaDataType type, cublasComputeType_t compute = CUBLAS_COMPUTE_32F) {
  switch (type) {
    case CUDA_R_16BF: return "bf16";
    case CUDA_R_16F: return "fp16";
    case CUDA_R_64F: return "fp64";
    case CUDA_R_32F: {
      bool is_tf32 = (math_mode & CUBLAS_TF32_TENSOR_OP_MATH) || compute == CUBLAS_COMPUTE_32F_FAST_TF32;
      return is_tf32 ? "tf32" : "fp32";
    }
    default: return "other";
  }
}
// As cuBLAS counts them, columns first: a row-major [N, K] x [K, M] arrives as M x N x K.
static cublasStatus_t product(const std::string& operands, long m, long n, long k, long batch = 1) {
  std::string shape = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  if (batch > 1) shape += " x " + std::to_string(batch);
  count("products", operands + " " + shape, 2.0 * m * n * k * batch, stream);
  return OK;
}

EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t* h) { *h = (cublasHandle_t)calloc(1, 64); return OK; }
EXPORT cublasStatus_t cublasDestroy_v2(cublasHandle_t h) { free(h); return OK; }
EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t s) { stream = s; return OK; }
EXPORT cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return OK; }
EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t m) { math_mode = m; return OK; }
EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* m) { *m = math_mode; return OK; }
EXPORT cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return OK; }
EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* m) {
  *m = CUBLAS_POINTER_MODE_HOST;
  return OK;
}
typedef cublasOperation_t Op;
EXPORT cublasStatus_t cublasGemmEx(
    cublasHandle_t, Op, Op, int m, int n, int k, const void*, const void*, cudaDataType type, int, const void*,
    cudaDataType, int, const void*, void*, cudaDataType, int, cublasComputeType_t compute, cublasGemmAlgo_t) {
  return product(precision(type, compute), m, n, k);
}
EXPORT cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t, Op, Op, int m, int n, int k, const void*, const void*, cudaDataType type, int, long long,
    const void*, cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long, int batch,
    cublasComputeType_t compute, cublasGemmAlgo_t) {
  return product(precision(type, compute), m, n, k, batch);
}
EXPORT cublasStatus_t cublasSgemmEx(
    cublasHandle_t, Op, Op, int m, int n, int k, const float*, const void*, cudaDataType type, int, const void*,
    cudaDataType, int, const float*, void*, cudaDataType, int) {
  return product(precision(type), m, n, k);
}
EXPORT cublasStatus_t cublasSgemm_v2(
    cublasHandle_t, Op, Op, int m, int n, int k, const float*, const float*, int, const float*, int, const float*,
    float*, int) {
  return product(precision(CUDA_R_32F), m, n, k);
}
EXPORT cublasStatus_t cublasDgemm_v2(
    cublasHandle_t, Op, Op, int m, int n, int k, const double*, const double*, int, const double*, int, const double*,
    double*, int) {
  return product("fp64", m, n, k);
}
EXPORT cublasStatus_t cublasSgemmStridedBatched(
    cublasHandle_t, Op, Op, int m, int n, int k, const float*, const float*, int, long long, const float*, int,
    long long, const float*, float*, int, long long, int batch) {
  return product(precision(CUDA_R_32F), m, n, k, batch);
}
EXPORT cublasStatus_t cublasSgemv_v2(
    cublasHandle_t, Op, int m, int n, const float*, const float*, int, const float*, int, const float*, float*, int) {
  return product("fp32", m, n, 1);
}
EXPORT cublasStatus_t cublasDgemv_v2(
    cublasHandle_t, Op, int m, int n, const double*, const double*, int, const double*, int, const double*, double*,
    int) {
  return product("fp64", m, n, 1);
}
EXPORT cublasStatus_t cublasSdot_v2(cublasHandle_t, int n, const float*, int, const float*, int, float*) {
  return product("fp32", 1, 1, n);
}
EXPORT cublasStatus_t cublasDdot_v2(cublasHandle_t, int n, const double*, int, const double*, int, double*) {
  return product("fp64", 1, 1, n);
}
EXPORT cublasStatus_t cublasDotEx(
    cublasHandle_t, int n, const void*, cudaDataType type, int, const void*, cudaDataType, int, void*, cudaDataType,
    cudaDataType) {
  return product(precision(type), 1, 1, n);
}

// ---- Lt

struct Layout {
  cudaDataType type;
  uint64_t rows, columns;
};
static void* opaque() { return calloc(1, 1024); }

EXPORT size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute, cudaDataType_t) {
  *d = (cublasLtMatmulDesc_t)opaque();
  *(cublasComputeType_t*)*d = compute;
  return OK;
}
EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { free(d); return OK; }
EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*, size_t) {
  return OK;
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  *p = (cublasLtMatmulPreference_t)opaque();
  return OK;
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { free(p); return OK; }
EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return OK;
}
EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t columns, int64_t) {
  *l = (cublasLtMatrixLayout_t)opaque();
  *(Layout*)*l = {type, rows, columns};
  return OK;
}
EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { free(l); return OK; }
EXPORT cublasStatus_t cublasLtMatrixLayoutSetAttribute(
    cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*, size_t) {
  return OK;
}
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result, int* n) {
  memset(result, 0, sizeof *result);
  *n = 1;
  return OK;
}
EXPORT cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t d, const void*, const void*, cublasLtMatrixLayout_t a, const void*,
    cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t c,
    const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t s) {
  Layout *left = (Layout*)a, *out = (Layout*)c;
  stream = s;
  uint64_t inner = left->rows == out->rows ? left->columns : left->rows;
  return product(precision(left->type, *(cublasComputeType_t*)d), out->rows, out->columns, inner);
}
