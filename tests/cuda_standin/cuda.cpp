// A stand-in for libcudart and libcuda. Device memory is host memory; copies, streams, events and the limit of a
// device's memory are real; kernels are counted and do nothing. One build serves one version of CUDA's headers.
#include "counts.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

// ---- counters

static std::recursive_mutex mutex;
typedef std::lock_guard<std::recursive_mutex> Lock;

static const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}

struct Count {
  long calls = 0;
  double amount = 0, largest = 0;
};
static std::map<std::pair<std::string, std::string>, Count>& counts() {
  static auto* all = new std::map<std::pair<std::string, std::string>, Count>();  // outlives static destructors
  return *all;
}
static std::atomic<bool> counting{true};
static void (*on_wait)(const char* what) = nullptr;

static double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// Every call in its order, as lines of group, name, amount, stream and event.
static FILE* timeline = nullptr;
static void note(
    const char* group, const std::string& name, double amount, const void* stream = nullptr,
    const void* event = nullptr) {
  Lock lock(mutex);
  if (timeline) fprintf(timeline, "%s\t%s\t%.0f\t%lx\t%lx\n", group, name.c_str(), amount, (long)stream, (long)event);
}

void count(const char* group, const std::string& name, double amount, const void* stream, const void* event) {
  if (!counting) return;
  Lock lock(mutex);
  Count& found = counts()[{group, name}];
  found.calls++;
  found.amount += amount;
  found.largest = std::max(found.largest, amount);
  note(group, name, amount, stream, event);
}

// With lags the device is behind the host: an event is complete once the host has waited after its record.
static std::atomic<bool> lags{false};
static std::atomic<long> recorded{0}, reached{0};

// The host waits for the device.
static void wait(const char* what, const void* stream = nullptr, const void* event = nullptr) {
  reached = recorded.load();
  count("waits", what, 0, stream, event);
  if (on_wait && counting) on_wait(what);
}

static std::string demangled(const char* name) {
  int status = 0;
  char* plain = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string found = status == 0 ? plain : name;
  free(plain);
  return found;
}

EXPORT void standin_reset() {
  Lock lock(mutex);
  counts().clear();
}
EXPORT void standin_counting(int on) { counting = on; }
EXPORT void standin_lags(int on) { lags = on; }
// Writes a timeline into a file from now on; of no path, ends it.
EXPORT void standin_timeline(const char* path) {
  Lock lock(mutex);
  if (timeline) fclose(timeline);
  timeline = path ? fopen(path, "w") : nullptr;
}
// Notes on the timeline where an operation of PyTorch begins and ends, with the bytes or FLOPs that are its.
EXPORT void standin_mark(const char* group, const char* name, double amount) { note(group, name, amount); }
EXPORT void standin_on_wait(void (*callback)(const char*)) { on_wait = callback; }
// Lines of group, name, calls, sum and maximum of the amounts, separated by tabs; valid until the next call.
EXPORT const char* standin_counts() {
  static std::string text;
  Lock lock(mutex);
  text.clear();
  char numbers[100];
  for (auto& [key, found] : counts()) {
    snprintf(numbers, sizeof numbers, "\t%ld\t%.0f\t%.0f\n", found.calls, found.amount, found.largest);
    bool is_kernel = key.first == "kernels";
    text += key.first + "\t" + (is_kernel ? demangled(key.second.c_str()) : key.second) + numbers;
  }
  return text.c_str();
}

// ---- devices: H100s; B200s in name and architecture with STANDIN_MAJOR=10

static const int SHARED_MEMORY = 49152, SHARED_MEMORY_OPTIN = 232448, MULTIPROCESSORS = 132;
static size_t device_bytes() {
  static size_t bytes = strtoull(setting("STANDIN_BYTES", "84943110144"), nullptr, 10);
  return bytes;
}
static int device_count() {
  static int devices = atoi(setting("STANDIN_DEVICES", "1"));
  return devices;
}
static int major_version() {
  static int version = atoi(setting("STANDIN_MAJOR", "9"));
  return version;
}
static const char* device_name() { return major_version() == 9 ? "NVIDIA H100 80GB HBM3" : "NVIDIA B200"; }
static thread_local int current_device = 0;
static thread_local cudaError_t last_error = cudaSuccess;
static cudaError_t fail(cudaError_t error) { return last_error = error; }

// cudaDevAttr... and CU_DEVICE_ATTRIBUTE_... have the same numbers.
static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED_MEMORY;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_MEMORY_OPTIN;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrMultiProcessorCount: return MULTIPROCESSORS;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrComputeCapabilityMajor: return major_version();
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrMemoryPoolsSupported: return 1;
  }
  return 0;
}

EXPORT cudaError_t cudaGetDeviceCount(int* n) { *n = device_count(); return cudaSuccess; }
// NVML, by which a process asks without touching CUDA.
EXPORT int nvmlInit() { return 0; }
EXPORT int nvmlDeviceGetCount_v2(unsigned* n) { *n = device_count(); return 0; }
EXPORT cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* v) { *v = CUDART_VERSION; return cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* v) { *v = CUDART_VERSION; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) { *v = attribute(a); return cudaSuccess; }
// CUDA 12's header renames this to ..._v2 by a macro.
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, device_name());
  p->totalGlobalMem = device_bytes();
  p->sharedMemPerBlock = SHARED_MEMORY;
  p->sharedMemPerBlockOptin = SHARED_MEMORY_OPTIN;
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->multiProcessorCount = MULTIPROCESSORS;
  p->major = major_version();
  p->textureAlignment = 512;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 52428800;
  p->unifiedAddressing = p->cooperativeLaunch = p->concurrentKernels = p->memoryPoolsSupported = 1;
  p->pciBusID = device;
  memset(p->uuid.bytes, device + 1, sizeof p->uuid.bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int device) {
  snprintf(s, n, "0000:%02x:00.0", device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() { wait("device"); return cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { *v = 1; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { *p = nullptr; return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
  *(uint64_t*)v = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
EXPORT const char* cudaGetErrorName(cudaError_t) { return "stand-in"; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof text, "the stand-in's CUDA error %d", error);
  return text;
}
EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

// ---- memory

static size_t used_bytes = 0;
static std::map<uintptr_t, size_t> device_memory, pinned_memory;

static bool inside(const std::map<uintptr_t, size_t>& memory, const void* p) {
  Lock lock(mutex);
  auto next = memory.upper_bound((uintptr_t)p);
  if (next == memory.begin()) return false;
  auto [begin, size] = *--next;
  return (uintptr_t)p < begin + size;
}
// Pages that nothing writes take no memory, so that a device may hold more than the host.
static void* reserve(size_t bytes, int protection = PROT_READ | PROT_WRITE) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
static size_t rounded(size_t bytes, size_t unit) { return std::max((bytes + unit - 1) / unit * unit, unit); }
static const size_t DEVICE_PAGE = 2 << 20, HOST_PAGE = 4096;

EXPORT cudaError_t cudaMalloc(void** p, size_t bytes) {
  Lock lock(mutex);
  count("memory", "allocate", bytes);
  bytes = rounded(bytes, DEVICE_PAGE);
  *p = used_bytes + bytes <= device_bytes() ? reserve(bytes) : nullptr;
  if (!*p) return fail(cudaErrorMemoryAllocation);
  device_memory[(uintptr_t)*p] = bytes;
  used_bytes += bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* p) {
  Lock lock(mutex);
  auto found = device_memory.find((uintptr_t)p);
  if (found == device_memory.end()) return p ? fail(cudaErrorInvalidValue) : cudaSuccess;
  count("memory", "free", found->second);
  munmap(p, found->second);
  used_bytes -= found->second;
  device_memory.erase(found);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = device_bytes();
  *free = device_bytes() - used_bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  Lock lock(mutex);
  count("memory", "allocate pinned", bytes);
  bytes = rounded(bytes, HOST_PAGE);
  *p = reserve(bytes);
  if (!*p) return fail(cudaErrorMemoryAllocation);
  pinned_memory[(uintptr_t)*p] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* p) {
  Lock lock(mutex);
  auto found = pinned_memory.find((uintptr_t)p);
  if (found == pinned_memory.end()) return cudaSuccess;
  munmap(p, found->second);
  pinned_memory.erase(found);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostGetDevicePointer(void** d, void* h, unsigned) { *d = h; return cudaSuccess; }
EXPORT cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  Lock lock(mutex);
  pinned_memory[(uintptr_t)p] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* p) {
  Lock lock(mutex);
  pinned_memory.erase((uintptr_t)p);
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeUnregistered;
  a->device = -2;
  if (inside(device_memory, p)) {
    a->type = cudaMemoryTypeDevice;
    a->device = current_device;
    a->devicePointer = (void*)p;
  } else if (inside(pinned_memory, p)) {
    a->type = cudaMemoryTypeHost;
    a->device = current_device;
    a->devicePointer = a->hostPointer = (void*)p;
  }
  return cudaSuccess;
}

// Larger copies are counted only: nothing reads the values, and they would take memory.
static size_t largest_copy() {
  static size_t bytes = strtoull(setting("STANDIN_LARGEST_COPY", "16777216"), nullptr, 10);
  return bytes;
}
static void copy(void* to, const void* from, size_t bytes, cudaStream_t stream = nullptr) {
  bool to_device = inside(device_memory, to), from_device = inside(device_memory, from);
  const char* name = to_device && from_device ? "on the device" : to_device ? "to the device" : "to the host";
  bool is_pinned = to_device == from_device || inside(pinned_memory, to_device ? from : to);
  count("copies", std::string(name) + (is_pinned ? "" : ", pageable"), bytes, stream);
  if (bytes <= largest_copy()) memmove(to, from, bytes);
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  copy(to, from, bytes);
  wait("copy");
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t s) {
  copy(to, from, bytes, s);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t s) {
  copy(to, from, bytes, s);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_row, const void* from, size_t from_row, size_t width, size_t rows, cudaMemcpyKind, cudaStream_t s) {
  count("copies", "of rows", width * rows, s);
  for (size_t row = 0; row < rows && width * rows <= largest_copy(); row++)
    memmove((char*)to + row * to_row, (const char*)from + row * from_row, width);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t s) {
  count("copies", "fill", bytes, s);
  if (bytes <= (1 << 20)) memset(p, value, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }
EXPORT cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaErrorNotSupported; }
EXPORT cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaErrorNotSupported; }
EXPORT cudaError_t cudaIpcCloseMemHandle(void*) { return cudaErrorNotSupported; }
EXPORT cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return cudaErrorNotSupported; }
EXPORT cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return cudaErrorNotSupported; }

// ---- streams and events

static std::atomic<long> last_handle{16};
template <class T> static T new_handle() { return (T)(last_handle += 16); }

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = new_handle<cudaStream_t>(); return cudaSuccess; }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return cudaSuccess; }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) { wait("stream", s); return cudaSuccess; }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  count("events", "a stream waits", 0, s, e);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
static cudaError_t no_capture(cudaStreamCaptureStatus* status, unsigned long long* id) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
typedef unsigned long long CaptureId;
#if CUDART_VERSION >= 13000
EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, CaptureId* id, cudaGraph_t*, const cudaGraphNode_t**,
    const cudaGraphEdgeData**, size_t*) {
  return no_capture(status, id);
}
#else
EXPORT cudaError_t cudaStreamGetCaptureInfo_v2(
    cudaStream_t, cudaStreamCaptureStatus* status, CaptureId* id, cudaGraph_t*, const cudaGraphNode_t**, size_t*) {
  return no_capture(status, id);
}
#endif
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorNotSupported; }
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaErrorNotSupported; }

struct Event {
  double at = 0;
  long number = 0;
};
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t) new Event();
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) { delete (Event*)e; return cudaSuccess; }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  ((Event*)e)->at = seconds();
  ((Event*)e)->number = ++recorded;
  count("events", "record", 0, s, e);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t e) {
  count("events", "query");
  return lags && ((Event*)e)->number > reached ? fail(cudaErrorNotReady) : cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) { wait("event", nullptr, e); return cudaSuccess; }
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  // At least some: a benchmark that measures nothing would repeat itself for ever.
  *milliseconds = std::max(50.0, (((Event*)to)->at - ((Event*)from)->at) * 1e3);
  return cudaSuccess;
}

// ---- kernels of PyTorch

static std::unordered_map<const void*, const char*>& kernels() {
  static auto* all = new std::unordered_map<const void*, const char*>();  // filled before main
  return *all;
}
static int fat_binary;
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;

EXPORT void** __cudaRegisterFatBinary(void*) { return (void**)&fat_binary; }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = name;
}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *(void**)stream = last.stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3, void**, size_t, cudaStream_t stream) {
  auto found = kernels().find(f);
  const char* name = found == kernels().end() ? "unknown" : found->second;
  count("kernels", name, (double)grid.x * grid.y * grid.z, stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  return cudaLaunchKernel(f, c->gridDim, c->blockDim, a, 0, c->stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(
    const void* f, dim3 grid, dim3 block, void** a, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(f, grid, block, a, shared, stream);
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) {
  f(data);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned) {
  f(s, cudaSuccess, data);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 10 * major_version();
  a->maxDynamicSharedSizeBytes = SHARED_MEMORY_OPTIN;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** p, const void*) { return cudaMalloc(p, 1 << 20); }
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
#if CUDART_VERSION >= 13000
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)f; return cudaSuccess; }
EXPORT cudaError_t __cudaLaunchKernel(
    cudaKernel_t k, dim3 grid, dim3 block, void** a, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel((const void*)k, grid, block, a, shared, stream);
}
#endif

// Graphs are not supported; PyTorch needs the names.
#define UNSUPPORTED(name, ...) EXPORT cudaError_t name(__VA_ARGS__) { return cudaErrorNotSupported; }
UNSUPPORTED(cudaGraphDebugDotPrint, cudaGraph_t, const char*, unsigned)
UNSUPPORTED(cudaGraphDestroy, cudaGraph_t)
UNSUPPORTED(cudaGraphExecDestroy, cudaGraphExec_t)
UNSUPPORTED(cudaGraphGetNodes, cudaGraph_t, cudaGraphNode_t*, size_t*)
UNSUPPORTED(cudaGraphInstantiate, cudaGraphExec_t*, cudaGraph_t, unsigned long long)
UNSUPPORTED(cudaGraphInstantiateWithFlags, cudaGraphExec_t*, cudaGraph_t, unsigned long long)
UNSUPPORTED(cudaGraphLaunch, cudaGraphExec_t, cudaStream_t)
#if CUDART_VERSION >= 13000
UNSUPPORTED(cudaGraphNodeGetDependencies, cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t*)
#endif

// ---- driver

typedef cudaDriverEntryPointQueryResult Query;

static cudaError_t entry_point(const char* name, void** f, Query* result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}
#if CUDART_VERSION < 13000
EXPORT cudaError_t cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long, Query* result) {
  return entry_point(name, f, result);
}
#endif
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** f, unsigned, unsigned long long, Query* result) {
  return entry_point(name, f, result);
}
EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* v) { *v = CUDA_VERSION; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* d, int i) { *d = i; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* n) { *n = device_count(); return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) { *v = attribute(a); return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetName(char* s, int n, CUdevice) { snprintf(s, n, "%s", device_name()); return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext* c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* d) { *d = current_device; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* v, CUlimit) { *v = 1 << 20; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { *c = (CUcontext)1; return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult, const char** s) { *s = "stand-in"; return CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorName(CUresult, const char** s) { *s = "stand-in"; return CUDA_SUCCESS; }

// Expandable segments: memory is made in pieces and mapped into reserved addresses.
static std::map<CUmemGenericAllocationHandle, size_t> pieces;

EXPORT CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = DEVICE_PAGE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressReserve(CUdeviceptr* p, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* reserved = reserve(bytes, PROT_NONE);
  *p = (CUdeviceptr)reserved;
  return reserved ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr p, size_t bytes) {
  munmap((void*)p, bytes);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemCreate(
    CUmemGenericAllocationHandle* piece, size_t bytes, const CUmemAllocationProp*, unsigned long long) {
  Lock lock(mutex);
  if (used_bytes + bytes > device_bytes()) return CUDA_ERROR_OUT_OF_MEMORY;
  count("memory", "allocate", bytes);
  used_bytes += bytes;
  *piece = new_handle<CUmemGenericAllocationHandle>();
  pieces[*piece] = bytes;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle piece) {
  Lock lock(mutex);
  count("memory", "free", pieces[piece]);
  used_bytes -= pieces[piece];
  pieces.erase(piece);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemMap(CUdeviceptr p, size_t bytes, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  Lock lock(mutex);
  mprotect((void*)p, bytes, PROT_READ | PROT_WRITE);
  device_memory[p] = bytes;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemUnmap(CUdeviceptr p, size_t bytes) {
  Lock lock(mutex);
  madvise((void*)p, bytes, MADV_DONTNEED);
  mprotect((void*)p, bytes, PROT_NONE);
  device_memory.erase(p);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

// ---- kernels of Triton

static std::map<CUfunction, std::string> functions;

static CUresult load(CUmodule* module, const char* image) {
  // ptxas makes an ELF file, with the architecture in its flags; ABI 0x41, of CUDA 13, moved it up.
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  if (memcmp(image, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  unsigned architecture = header->e_flags >> (header->e_ident[EI_OSABI] == 0x41 ? 8 : 0) & 0xff;
  count("modules", "sm_" + std::to_string(architecture));
  *module = new_handle<CUmodule>();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) { return load(module, (const char*)image); }
EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return load(module, (const char*)image);
}
EXPORT CUresult cuModuleLoad(CUmodule* module, const char* path) {
  Elf64_Ehdr header = {};
  FILE* file = fopen(path, "r");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  size_t read = fread(&header, sizeof header, 1, file);
  fclose(file);
  return read == 1 ? load(module, (const char*)&header) : CUDA_ERROR_INVALID_IMAGE;
}
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) {
  Lock lock(mutex);
  *f = new_handle<CUfunction>();
  functions[*f] = name;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 1; return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  *n = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuTensorMapEncodeTiled(
    CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}
// Triton asks for every pointer that a kernel gets: the host's memory is refused here, as a driver does.
EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute a, CUdeviceptr p) {
  if (a != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *(int*)value = 0;
    return CUDA_SUCCESS;
  }
  if (!inside(device_memory, (void*)p) && !inside(pinned_memory, (void*)p)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr*)value = p;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(
    CUfunction f, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned, unsigned, CUstream stream, void**,
    void**) {
  Lock lock(mutex);
  count("triton", functions[f], (double)x * y * z, stream);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, 0, 0, 0, 0, c->hStream, nullptr, nullptr);
}
EXPORT CUresult cuLaunchCooperativeKernel(
    CUfunction f, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned, unsigned, CUstream stream, void**) {
  return cuLaunchKernel(f, x, y, z, 0, 0, 0, 0, stream, nullptr, nullptr);
}
EXPORT CUresult cuLinkAddData_v2(
    CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned, CUjit_option*, void**) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORT CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) { return CUDA_ERROR_NOT_SUPPORTED; }
