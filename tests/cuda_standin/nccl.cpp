// A stand-in for libnccl over shared memory, at the moment of the call. Messages above a limit are counted and not
// moved. With STANDIN_ALONE this is one rank of a world that is not there: every other rank sends what it sends.
#include "counts.h"
#include "no_halves.h"

#include <fcntl.h>
#include <nccl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <vector>

static const size_t LIMIT = 1 << 20, HEADER = 4096;

struct Barrier {
  std::atomic<int> arrived, phase;
};
struct Communicator {
  int rank, size;
  std::string name;
  Barrier* barrier;
  char* slots;
  std::map<int, long> sent, received;
  std::map<int, std::vector<char>> mirror;
  int splits = 0;
};
static Communicator* of(ncclComm_t c) { return (Communicator*)c; }

static bool is_alone() {
  static bool alone = getenv("STANDIN_ALONE") != nullptr;
  return alone;
}
// Sleeps longer the longer it waits: there are more ranks than cores.
static void wait_until(const std::function<bool()>& is_true) {
  for (long i = 0; !is_true(); i++) usleep(i < 1000 ? 20 : 500);
}
static void meet(Communicator* c) {
  int phase = c->barrier->phase;
  if (c->barrier->arrived.fetch_add(1) + 1 < c->size) return wait_until([=] { return c->barrier->phase != phase; });
  c->barrier->arrived = 0;
  c->barrier->phase++;
}
static size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    default: return 8;
  }
}
static void counted(const char* what, Communicator* c, size_t bytes, cudaStream_t stream) {
  count("collectives", std::string(what) + " over " + std::to_string(c->size), bytes, stream);
}

// ---- communicators

EXPORT ncclResult_t ncclGetVersion(int* v) { *v = NCCL_VERSION_CODE; return ncclSuccess; }
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  memset(id, 0, sizeof *id);
  unsigned long words[2] = {0, 0};
  FILE* file = fopen("/dev/urandom", "r");
  if (!file || fread(words, sizeof words, 1, file) != 1) return ncclSystemError;
  fclose(file);
  snprintf((char*)id, 64, "%016lx%016lx", words[0], words[1]);
  return ncclSuccess;
}
static ncclResult_t join(ncclComm_t* out, int size, const std::string& name, int rank) {
  Communicator* c = new Communicator{rank, size, name};
  counted("communicator", c, 0, nullptr);
  *out = (ncclComm_t)c;
  if (is_alone()) return ncclSuccess;
  int file = shm_open(c->name.c_str(), O_RDWR | O_CREAT, 0600);
  size_t bytes = HEADER + size * LIMIT;
  if (file < 0 || ftruncate(file, bytes)) return ncclSystemError;
  char* memory = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  c->barrier = (Barrier*)memory;
  c->slots = memory + HEADER;
  meet(c);
  shm_unlink(c->name.c_str());
  return ncclSuccess;
}
static ncclResult_t join(ncclComm_t* out, int size, const ncclUniqueId& id, int rank) {
  return join(out, size, std::string("/cuda-standin-") + (const char*)&id, rank);
}
EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int n, ncclUniqueId id, int rank, ncclConfig_t*) {
  return join(c, n, id, rank);
}
EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* c, int n, ncclUniqueId id, int rank) { return join(c, n, id, rank); }
EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t* c, int n, int rank, int, ncclUniqueId* id, ncclConfig_t*) {
  return join(c, n, *id, rank);
}
EXPORT ncclResult_t ncclCommInitAll(ncclComm_t*, int, const int*) { return ncclInvalidUsage; }
EXPORT ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }
EXPORT ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }
EXPORT ncclResult_t ncclCommCount(const ncclComm_t c, int* n) { *n = of(c)->size; return ncclSuccess; }
EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t c, int* n) { *n = of(c)->rank; return ncclSuccess; }
EXPORT ncclResult_t ncclCommCuDevice(const ncclComm_t, int* n) { *n = 0; return ncclSuccess; }
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* e) { *e = ncclSuccess; return ncclSuccess; }
EXPORT const char* ncclGetErrorString(ncclResult_t) { return "the stand-in's NCCL error"; }
EXPORT const char* ncclGetLastError(ncclComm_t) { return ""; }
EXPORT ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void**) { return ncclSuccess; }
EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }
EXPORT ncclResult_t ncclMemAlloc(void**, size_t) { return ncclInvalidUsage; }
EXPORT ncclResult_t ncclMemFree(void*) { return ncclSuccess; }
EXPORT ncclResult_t ncclRedOpCreatePreMulSum(
    ncclRedOp_t* op, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t) {
  *op = ncclSum;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

// ---- collectives

template <class T> static void reduce(Communicator* c, void* out, size_t first, size_t n, ncclRedOp_t op) {
  for (size_t i = 0; i < n; i++) {
    T total = ((T*)c->slots)[first + i];
    for (int rank = 1; rank < c->size; rank++) {
      T next = ((T*)(c->slots + rank * LIMIT))[first + i];
      total = op == ncclMax ? std::max(total, next) : op == ncclMin ? std::min(total, next) : total + next;
    }
    ((T*)out)[i] = op == ncclAvg ? total / c->size : total;
  }
}
static void reduce(Communicator* c, void* out, size_t first, size_t n, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclInt8: return reduce<int8_t>(c, out, first, n, op);
    case ncclUint8: return reduce<uint8_t>(c, out, first, n, op);
    case ncclInt32: return reduce<int32_t>(c, out, first, n, op);
    case ncclUint32: return reduce<uint32_t>(c, out, first, n, op);
    case ncclInt64: return reduce<int64_t>(c, out, first, n, op);
    case ncclUint64: return reduce<uint64_t>(c, out, first, n, op);
    case ncclFloat32: return reduce<float>(c, out, first, n, op);
    case ncclFloat64: return reduce<double>(c, out, first, n, op);
    default: memmove(out, c->slots + first * 2, n * 2);  // Halves hold no values here: kernels make them.
  }
}
// Hands a rank's message to the others, if it is small enough to be moved; `read` then takes theirs.
static void exchange(Communicator* c, const void* in, size_t bytes, const std::function<void()>& read) {
  if (is_alone() || bytes > LIMIT) return;
  memmove(c->slots + c->rank * LIMIT, in, bytes);
  meet(c);
  read();
  meet(c);
}

struct Part {
  int color, key;
};
EXPORT ncclResult_t ncclCommSplit(ncclComm_t h, int color, int key, ncclComm_t* out, ncclConfig_t*) {
  if (is_alone()) return ncclInvalidUsage;  // Nobody says how many ranks have this color.
  Communicator* c = of(h);
  Part mine{color, key};
  int size = 0, rank = 0;
  exchange(c, &mine, sizeof mine, [&] {
    for (int other = 0; other < c->size; other++) {
      Part part = *(Part*)(c->slots + other * LIMIT);
      if (part.color != color) continue;
      size++;
      rank += part.key < key || (part.key == key && other < c->rank);
    }
  });
  std::string name = c->name + "-" + std::to_string(c->splits++) + "-" + std::to_string(color);
  *out = nullptr;
  return color == NCCL_SPLIT_NOCOLOR ? ncclSuccess : join(out, size, name, rank);
}

EXPORT ncclResult_t ncclAllReduce(
    const void* in, void* out, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type);
  counted("all-reduce", c, bytes, stream);
  if (is_alone() && bytes <= LIMIT && in != out) memmove(out, in, bytes);
  exchange(c, in, bytes, [&] { reduce(c, out, 0, n, type, op); });
  return ncclSuccess;
}
EXPORT ncclResult_t ncclReduce(
    const void* in, void* out, size_t n, ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t h,
    cudaStream_t stream) {
  Communicator* c = of(h);
  counted("reduce", c, n * width(type), stream);
  exchange(c, in, n * width(type), [&] { if (c->rank == root) reduce(c, out, 0, n, type, op); });
  return ncclSuccess;
}
EXPORT ncclResult_t ncclReduceScatter(
    const void* in, void* out, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type) * c->size;
  counted("reduce-scatter", c, bytes, stream);
  exchange(c, in, bytes, [&] { reduce(c, out, n * c->rank, n, type, op); });
  return ncclSuccess;
}
EXPORT ncclResult_t ncclAllGather(
    const void* in, void* out, size_t n, ncclDataType_t type, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type);
  counted("all-gather", c, bytes * c->size, stream);
  auto read = [&](const char* slots, size_t step) {
    for (int rank = 0; rank < c->size; rank++) memmove((char*)out + rank * bytes, slots + rank * step, bytes);
  };
  if (is_alone() && bytes <= 4096) read((const char*)in, 0);
  exchange(c, in, bytes, [&] { read(c->slots, LIMIT); });
  return ncclSuccess;
}
EXPORT ncclResult_t ncclBroadcast(
    const void* in, void* out, size_t n, ncclDataType_t type, int root, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type);
  counted("broadcast", c, bytes, stream);
  exchange(c, c->rank == root ? in : out, bytes, [&] { memmove(out, c->slots + root * LIMIT, bytes); });
  return ncclSuccess;
}
EXPORT ncclResult_t ncclBcast(void* x, size_t n, ncclDataType_t type, int root, ncclComm_t h, cudaStream_t stream) {
  return ncclBroadcast(x, x, n, type, root, h, stream);
}

// NCCL 2.28 and later; torch 2.15 takes it for equal splits.
EXPORT ncclResult_t ncclAlltoAll(
    const void* in, void* out, size_t n, ncclDataType_t type, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type);
  counted("all-to-all", c, bytes * c->size, stream);
  if (is_alone() && bytes * c->size <= LIMIT) memmove(out, in, bytes * c->size);
  exchange(c, in, bytes * c->size, [&] {
    for (int rank = 0; rank < c->size; rank++)
      memmove((char*)out + rank * bytes, c->slots + rank * LIMIT + c->rank * bytes, bytes);
  });
  return ncclSuccess;
}

// ---- messages between two ranks: one file each, read when the group of calls ends

static thread_local int depth = 0;
static thread_local std::vector<std::function<void()>> receives;

static std::string letter(Communicator* c, int from, int to, long number) {
  return "/dev/shm" + c->name + "-" + std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number);
}
static void finish_receives() {
  auto all = std::move(receives);
  receives.clear();
  for (auto& receive : all) receive();
}
EXPORT ncclResult_t ncclGroupStart() { depth++; return ncclSuccess; }
EXPORT ncclResult_t ncclGroupEnd() {
  if (--depth == 0) finish_receives();
  return ncclSuccess;
}
EXPORT ncclResult_t ncclSend(const void* x, size_t n, ncclDataType_t type, int to, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type), moved = bytes <= LIMIT ? bytes : 0;
  counted("send", c, bytes, stream);
  if (is_alone()) {
    c->mirror[to].assign((const char*)x, (const char*)x + moved);
    return ncclSuccess;
  }
  std::string path = letter(c, c->rank, to, c->sent[to]++), part = path + ".part";
  FILE* file = fopen(part.c_str(), "w");
  if (!file || fwrite(x, 1, moved, file) != moved) return ncclSystemError;
  fclose(file);
  return rename(part.c_str(), path.c_str()) ? ncclSystemError : ncclSuccess;
}
EXPORT ncclResult_t ncclRecv(void* x, size_t n, ncclDataType_t type, int from, ncclComm_t h, cudaStream_t stream) {
  Communicator* c = of(h);
  size_t bytes = n * width(type), moved = bytes <= LIMIT ? bytes : 0;
  counted("receive", c, bytes, stream);
  if (is_alone()) {
    receives.push_back([=] {
      std::vector<char>& sent = c->mirror[from];
      if (sent.size() >= moved) memmove(x, sent.data(), moved);
    });
  } else {
    std::string path = letter(c, from, c->rank, c->received[from]++);
    receives.push_back([=] {
      wait_until([&] { return access(path.c_str(), F_OK) == 0; });
      FILE* file = fopen(path.c_str(), "r");
      if (file && fread(x, 1, moved, file) < moved) fprintf(stderr, "cuda-standin: %s is cut short\n", path.c_str());
      if (file) fclose(file);
      unlink(path.c_str());
    });
  }
  if (depth == 0) finish_receives();
  return ncclSuccess;
}
