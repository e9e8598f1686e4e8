// Functions of the driver and of NVML that PyTorch looks up together with those that it calls, and misses if they are
// not there. This file includes no header of CUDA, which declares them.
#include "counts.h"

enum { OK = 0, NVML_NOT_SUPPORTED = 3, CUDA_NOT_SUPPORTED = 801 };
#define RETURNS(code, name) \
  EXPORT int name() { return code; }

RETURNS(CUDA_NOT_SUPPORTED, cuCtxFromGreenCtx)
RETURNS(CUDA_NOT_SUPPORTED, cuCtxPopCurrent)
RETURNS(CUDA_NOT_SUPPORTED, cuCtxPushCurrent)
RETURNS(CUDA_NOT_SUPPORTED, cuDevResourceGenerateDesc)
RETURNS(CUDA_NOT_SUPPORTED, cuDevSmResourceSplitByCount)
RETURNS(CUDA_NOT_SUPPORTED, cuDeviceGetDevResource)
RETURNS(CUDA_NOT_SUPPORTED, cuGreenCtxCreate)
RETURNS(CUDA_NOT_SUPPORTED, cuGreenCtxDestroy)
RETURNS(CUDA_NOT_SUPPORTED, cuGreenCtxStreamCreate)
RETURNS(CUDA_NOT_SUPPORTED, cuLogsRegisterCallback)
RETURNS(CUDA_NOT_SUPPORTED, cuLogsUnregisterCallback)
RETURNS(CUDA_NOT_SUPPORTED, cuMemExportToShareableHandle)
RETURNS(CUDA_NOT_SUPPORTED, cuMemGetAddressRange)
RETURNS(CUDA_NOT_SUPPORTED, cuMemGetAllocationPropertiesFromHandle)
RETURNS(CUDA_NOT_SUPPORTED, cuMemImportFromShareableHandle)
RETURNS(CUDA_NOT_SUPPORTED, cuMemRetainAllocationHandle)
RETURNS(CUDA_NOT_SUPPORTED, cuMemsetD32Async)
RETURNS(CUDA_NOT_SUPPORTED, cuMulticastAddDevice)
RETURNS(CUDA_NOT_SUPPORTED, cuMulticastBindMem)
RETURNS(CUDA_NOT_SUPPORTED, cuMulticastCreate)
RETURNS(CUDA_NOT_SUPPORTED, cuMulticastUnbind)
RETURNS(CUDA_NOT_SUPPORTED, cuStreamWriteValue32)

// NVML, which this library is too, under another name.
RETURNS(OK, nvmlInit_v2)
RETURNS(OK, nvmlDeviceGetHandleByPciBusId_v2)
RETURNS(NVML_NOT_SUPPORTED, nvmlDeviceGetComputeRunningProcesses)
RETURNS(NVML_NOT_SUPPORTED, nvmlDeviceGetGpuFabricInfoV)
RETURNS(NVML_NOT_SUPPORTED, nvmlDeviceGetNvLinkRemoteDeviceType)
RETURNS(NVML_NOT_SUPPORTED, nvmlDeviceGetNvLinkRemotePciInfo_v2)
RETURNS(NVML_NOT_SUPPORTED, nvmlSystemGetCudaDriverVersion_v2)
