// A CUDA card that has memory and computes nothing.
//
// Preloaded into a CUDA build of torch, this library stands in for the CUDA runtime, cuBLAS, cuDNN, the driver and NVML. What is
// allocated is kept account of, streams and events exist, kernels are counted and dropped. So torch's own caching allocator,
// what its operators take inside, and every line that runs on a card only can be watched where there is none. Work is done when it is
// given, or takes as long as somebody says (the clock, below).
// Large tensors hold no values: their pages are never touched. Functions not named here do nothing and succeed
// (`library.py` writes them).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cudnn_backend.h>

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

size_t setting(const char* name) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : 0;
}

constexpr size_t MIB = size_t(1) << 20, PAGE = 2 * MIB, HOST_PAGE = 4096, CARRIED = 64 << 10;
const size_t CONTEXT = setting("EMULATED_CARD_CONTEXT_MIB") * MIB;
size_t card_bytes = setting("EMULATED_CARD_MIB") * MIB;
size_t pinnable_bytes = SIZE_MAX;  // of the host's memory
const int MAJOR = setting("EMULATED_CARD_CAPABILITY") / 10, MINOR = setting("EMULATED_CARD_CAPABILITY") % 10;
const int NUM_PROCESSORS = 128, THREADS = 1536, SHARED_KIB = 99;

const char* card_name() {
    const char* text = getenv("EMULATED_CARD_NAME");
    return text ? text : "Emulated card";
}

struct Span { size_t size; cudaMemoryType type; };
std::mutex lock;
std::map<uintptr_t, Span> spans;  // by start: the card's memory and pinned memory
std::map<unsigned long long, size_t> handles;  // of cuMemCreate
size_t used = 0, context = 0;  // the context is there from the first call that needs it
std::atomic<uint64_t> num_kernels, num_products, num_copies, num_pageable_copies, bytes_to_card, bytes_to_host, num_waits;
thread_local cudaError_t last_error = cudaSuccess;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The clock. Every stream does one thing after the other; of all streams one kernel computes at a time, and the link carries one copy
// each way. The host goes on as it gives work away, and waits where it would wait. Seconds; off while the link has no rate.
enum Engine { COMPUTE, TO_CARD, TO_HOST, NUM_ENGINES };
constexpr double PAGEABLE = 0.5, POLL = 1e-6;  // share of the link's rate that pageable memory reaches; a question whether an event has passed
struct Stream { double free_at; };
struct Event { double at; };
struct Busy { double engine, start, stop; };
struct {
    std::mutex lock;
    double link, launch, host, latest, free_at[NUM_ENGINES];
    std::vector<Busy> busy;
} clock_;
Stream default_stream;
thread_local cudaStream_t computing;  // where this thread's last kernel went

Stream& at(cudaStream_t stream) { return (uintptr_t)stream <= 2 ? default_stream : *(Stream*)stream; }

void occupy(Engine engine, cudaStream_t stream, double seconds, bool host_waits = false) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    double start = std::max({clock_.host, at(stream).free_at, clock_.free_at[engine]}), stop = start + seconds;
    at(stream).free_at = clock_.free_at[engine] = stop;
    clock_.latest = std::max(clock_.latest, stop);
    if (host_waits) clock_.host = stop;
    clock_.busy.push_back({(double)engine, start, stop});
}

void wait_until(double moment) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    clock_.host = std::max(clock_.host, moment);
}

cudaError_t passed(double moment) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    if (!clock_.link || moment <= clock_.host) return cudaSuccess;
    clock_.host += POLL;
    return cudaErrorNotReady;
}

void host_works(double seconds) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    clock_.host += seconds;
}

cudaError_t failed(cudaError_t error) { return last_error = error; }

void* reserve(size_t size, size_t alignment, int protection) {
    void* p = mmap(nullptr, size + alignment, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : (void*)(((uintptr_t)p + alignment - 1) / alignment * alignment);
}

bool take(size_t size) {
    context = CONTEXT;
    if (used + context + size > card_bytes) return false;
    used += size;
    return true;
}

cudaMemoryType type_of(const void* p) {
    std::lock_guard<std::mutex> guard(lock);
    auto it = spans.upper_bound((uintptr_t)p);
    if (it == spans.begin()) return cudaMemoryTypeUnregistered;
    --it;
    return (uintptr_t)p < it->first + it->second.size ? it->second.type : cudaMemoryTypeUnregistered;
}

// Small copies carry their bytes: counters and indices arrive. Large ones are weights and activations, which mean nothing here; who brings
// them to pageable memory wants to look at them, and finds zeros.
void copy(void* to, const void* from, size_t size, cudaStream_t stream, bool host_waits = false) {
    cudaMemoryType target = type_of(to), source = type_of(from);
    bool to_card = target == cudaMemoryTypeDevice && source != cudaMemoryTypeDevice;
    bool to_host = source == cudaMemoryTypeDevice && target != cudaMemoryTypeDevice;
    bool pageable = target == cudaMemoryTypeUnregistered || source == cudaMemoryTypeUnregistered;
    num_copies++;
    if (to_card) bytes_to_card += size;
    if (to_host) bytes_to_host += size;
    if (pageable) num_pageable_copies++;
    if (clock_.link && (to_card || to_host))
        occupy(to_card ? TO_CARD : TO_HOST, stream, size / (clock_.link * (pageable ? PAGEABLE : 1)), host_waits || pageable);
    host_works(clock_.launch);
    if (size <= CARRIED) memmove(to, from, size);
    else if (to_host && target == cudaMemoryTypeUnregistered) memset(to, 0, size);
}

cudaError_t allocate(void** p, size_t size, size_t page, cudaMemoryType type) {
    std::lock_guard<std::mutex> guard(lock);
    size = (size + page - 1) / page * page;
    *p = nullptr;
    if (type == cudaMemoryTypeDevice ? !take(size) : size > pinnable_bytes) return failed(cudaErrorMemoryAllocation);
    *p = reserve(size, page, PROT_READ | PROT_WRITE);
    if (!*p) return failed(cudaErrorMemoryAllocation);
    if (type == cudaMemoryTypeHost) pinnable_bytes -= size;
    spans[(uintptr_t)*p] = {size, type};
    return cudaSuccess;
}

cudaError_t give_back(void* p, cudaMemoryType type) {
    std::lock_guard<std::mutex> guard(lock);
    if (type == cudaMemoryTypeDevice) context = CONTEXT;
    if (!p) return cudaSuccess;
    auto it = spans.find((uintptr_t)p);
    if (it == spans.end() || it->second.type != type) return failed(cudaErrorInvalidValue);
    if (type == cudaMemoryTypeDevice) used -= it->second.size;
    else pinnable_bytes += it->second.size;
    munmap(p, it->second.size);
    spans.erase(it);
    return cudaSuccess;
}

cudaError_t launched(cudaStream_t stream) {
    num_kernels++;
    computing = stream;
    host_works(clock_.launch);
    return cudaSuccess;
}

thread_local struct { dim3 grid, block; size_t shared; void* stream; } pending_launch;

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// ---- what was done, for who asks --------------------------------------------------------------------------------------

API void emulated_card_counters(uint64_t found[7]) {
    const uint64_t values[7] = {num_kernels, num_products, num_copies, num_pageable_copies, bytes_to_card, bytes_to_host, num_waits};
    memcpy(found, values, sizeof values);
}
API void emulated_card_product() { num_products++; host_works(clock_.launch); }

// From here on the card is one of so many bytes.
API void emulated_card_resize(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    card_bytes = bytes;
}

// From here on so many bytes of the host's memory can be pinned, beside those that are.
API void emulated_card_pins(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    pinnable_bytes = bytes;
}

// From here on copies take as long as a link of so many bytes a second needs, and the host takes so many seconds for whatever it gives
// away; 0 stops the clock.
API void emulated_card_clock(double link, double launch) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    clock_.link = link;
    clock_.launch = launch;
    clock_.host = std::max({clock_.host, clock_.latest, now()});  // what was done before has passed
    clock_.busy.clear();
}
// What was last given to the card takes so long.
API void emulated_card_work(double seconds) { occupy(COMPUTE, computing, seconds); }
// When what was busy, as (engine, start, stop), since this was last asked; returns how many there are, the first `room` of them in `found`.
API size_t emulated_card_busy(double* found, size_t room) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    size_t count = clock_.busy.size();
    if (room < count) return count;
    memcpy(found, clock_.busy.data(), count * sizeof(Busy));
    clock_.busy.clear();
    return count;
}

// ---- the device ---------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { num_waits++; wait_until(clock_.latest); return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int) { snprintf(id, length, "0000:01:00.0"); return cudaSuccess; }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
        case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
        case cudaDevAttrMultiProcessorCount: *value = NUM_PROCESSORS; break;
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_KIB << 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (SHARED_KIB + 1) << 10; break;
        case cudaDevAttrMaxGridDimX: *value = INT32_MAX; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrUnifiedAddressing: *value = 1; break;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", card_name());
    p->totalGlobalMem = card_bytes;
    p->major = MAJOR;
    p->minor = MINOR;
    p->multiProcessorCount = NUM_PROCESSORS;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = THREADS;
    p->maxGridSize[0] = INT32_MAX;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = SHARED_KIB << 10;
    p->sharedMemPerMultiprocessor = (SHARED_KIB + 1) << 10;
    p->l2CacheSize = 50 << 20;
    p->unifiedAddressing = p->concurrentKernels = p->asyncEngineCount = 1;
    return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> guard(lock);
    context = CONTEXT;
    *total = card_bytes;
    *free = card_bytes - std::min(card_bytes, used + context);
    return cudaSuccess;
}
API cudaError_t cudaGetLastError() { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : e ? "emulated error" : "no error"; }
API const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }

// ---- memory -------------------------------------------------------------------------------------------------------------

API cudaError_t cudaMalloc(void** p, size_t size) { return allocate(p, size, PAGE, cudaMemoryTypeDevice); }
API cudaError_t cudaFree(void* p) { return give_back(p, cudaMemoryTypeDevice); }
API cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t) { return cudaMalloc(p, size); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) { return allocate(p, size, HOST_PAGE, cudaMemoryTypeHost); }
API cudaError_t cudaFreeHost(void* p) { return give_back(p, cudaMemoryTypeHost); }
API cudaError_t cudaHostRegister(void* p, size_t size, unsigned) {
    std::lock_guard<std::mutex> guard(lock);
    spans[(uintptr_t)p] = {size, cudaMemoryTypeHost};
    return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
    std::lock_guard<std::mutex> guard(lock);
    return spans.erase((uintptr_t)p) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->type = type_of(p);
    if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = (void*)p;
    if (a->type == cudaMemoryTypeHost) a->hostPointer = (void*)p;
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) { num_waits++; copy(to, from, size, nullptr, true); return cudaSuccess; }
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) { copy(to, from, size, stream); return cudaSuccess; }
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, stream);
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { static char symbol[HOST_PAGE]; *p = symbol; return cudaSuccess; }
API cudaError_t cudaMemset(void* p, int value, size_t size) { if (size <= CARRIED) memset(p, value, size); return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) { return cudaMemset(p, value, size); }

// Virtual memory, of which expandable segments are made.
API CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) { *size = PAGE; return CUDA_SUCCESS; }
API CUresult cuMemAddressReserve(CUdeviceptr* p, size_t size, size_t alignment, CUdeviceptr, unsigned long long) {
    *p = (CUdeviceptr)reserve(size, std::max(alignment, PAGE), PROT_NONE);
    return *p ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemAddressFree(CUdeviceptr p, size_t size) { munmap((void*)p, size); return CUDA_SUCCESS; }
API CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*, unsigned long long) {
    std::lock_guard<std::mutex> guard(lock);
    static unsigned long long next = 1;
    if (!take(size)) return CUDA_ERROR_OUT_OF_MEMORY;
    handles[*handle = next++] = size;
    return CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    std::lock_guard<std::mutex> guard(lock);
    auto it = handles.find(handle);
    if (it == handles.end()) return CUDA_ERROR_INVALID_VALUE;
    used -= it->second;
    handles.erase(it);
    return CUDA_SUCCESS;
}
API CUresult cuMemMap(CUdeviceptr p, size_t size, size_t, CUmemGenericAllocationHandle, unsigned long long) {
    std::lock_guard<std::mutex> guard(lock);
    spans[p] = {size, cudaMemoryTypeDevice};
    return CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr p, size_t size, const CUmemAccessDesc*, size_t) {
    return mprotect((void*)p, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuMemUnmap(CUdeviceptr p, size_t size) {
    std::lock_guard<std::mutex> guard(lock);
    spans.erase(spans.lower_bound(p), spans.lower_bound(p + size));
    mmap((void*)p, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);  // its pages go, too
    return CUDA_SUCCESS;
}

// ---- streams and events ---------------------------------------------------------------------------------------------------

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { *stream = (cudaStream_t) new Stream{}; return cudaSuccess; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { delete (Stream*)stream; return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { num_waits++; wait_until(at(stream).free_at); return cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return passed(at(stream).free_at); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    if (clock_.link) at(stream).free_at = std::max(at(stream).free_at, ((Event*)event)->at);
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) { call(stream, cudaSuccess, data); return cudaSuccess; }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) { call(data); return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { *event = (cudaEvent_t) new Event{}; return cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { delete (Event*)event; return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    std::lock_guard<std::mutex> guard(clock_.lock);
    ((Event*)event)->at = clock_.link ? std::max(at(stream).free_at, clock_.host) : now();
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    num_waits++;
    if (clock_.link) wait_until(((Event*)event)->at);
    return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return passed(((Event*)event)->at); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) { *ms = (((Event*)to)->at - ((Event*)from)->at) * 1e3; return cudaSuccess; }

// ---- kernels --------------------------------------------------------------------------------------------------------------

API void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }
API char __cudaInitModule(void**) { return 1; }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) { pending_launch = {grid, block, shared, stream}; return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pending_launch.grid;
    *block = pending_launch.block;
    *shared = pending_launch.shared;
    *(void**)stream = pending_launch.stream;
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) { return launched(stream); }
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return launched(stream); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) { return launched(config->stream); }
API cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return launched(stream); }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = MAJOR * 10 + MINOR;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads, size_t) { *count = std::max(1, THREADS / std::max(1, threads)); return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* function, int threads, size_t shared, unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, function, threads, shared);
}

// ---- the driver -------------------------------------------------------------------------------------------------------------

static CUresult unsupported() { return CUDA_ERROR_NOT_SUPPORTED; }

API CUresult cuGetErrorString(CUresult, const char** text) { *text = "emulated error"; return CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* device, int) { *device = 0; return CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice) { *found = (CUcontext)1; return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* found) { *found = (CUcontext)1; return CUDA_SUCCESS; }
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* found, CUpointer_attribute, CUdeviceptr pointer) { *(CUdeviceptr*)found = pointer; return CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void**, void**) { return (CUresult)launched(config->hStream); }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* status) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (!*function) *function = (void*)unsupported;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- cuBLAS: objects that can be made, and algorithms without scratch memory; status 0 is success -------------------------------

#define MAKES(name) API int name(void** object, ...) { *object = calloc(1, 64); return 0; }
#define FREES(name) API int name(void* object) { free(object); return 0; }
MAKES(cublasCreate_v2) FREES(cublasDestroy_v2)
MAKES(cublasLtMatmulDescCreate) FREES(cublasLtMatmulDescDestroy)
MAKES(cublasLtMatrixLayoutCreate) FREES(cublasLtMatrixLayoutDestroy)
MAKES(cublasLtMatmulPreferenceCreate) FREES(cublasLtMatmulPreferenceDestroy)

API int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* count) { *count = 1; return 0; }

// ---- cuDNN: descriptors that say nothing ---------------------------------------------------------------------------------------

struct cudnnContext { cudaStream_t stream; };
API size_t cudnnGetVersion() { return CUDNN_VERSION; }
API cudnnStatus_t cudnnGetProperty(libraryPropertyType type, int* value) {
    *value = type == MAJOR_VERSION ? CUDNN_MAJOR : type == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
    return CUDNN_STATUS_SUCCESS;
}
API size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
API const char* cudnnGetErrorString(cudnnStatus_t) { return "emulated error"; }
API cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) { *handle = new cudnnContext{}; return CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) { handle->stream = stream; return CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) { *stream = handle->stream; return CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* object) { *object = calloc(1, 64); return CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t object) { free(object); return CUDNN_STATUS_SUCCESS; }
// Of every graph: one engine, of which there is nothing to say, and which wants no workspace.
API cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t room, int64_t* count, void* found) {
    bool is_number = type == CUDNN_TYPE_INT64 || type == CUDNN_TYPE_INT32;
    if (is_number && found && room) memset(found, 0, type == CUDNN_TYPE_INT64 ? sizeof(int64_t) : sizeof(int32_t));
    if (count) *count = is_number || name == CUDNN_ATTR_ENGINEHEUR_RESULTS || name == CUDNN_ATTR_ENGINECFG_ENGINE;
    return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
    launched(handle->stream);
    return CUDNN_STATUS_SUCCESS;
}

// ---- NVML -------------------------------------------------------------------------------------------------------------------

struct NvmlMemory { unsigned version; unsigned long long total, reserved, free, used; };
struct NvmlProcess { unsigned pid; unsigned long long used; unsigned instances[2]; };
API int nvmlInit_v2() { return 0; }
API int nvmlInitWithFlags(unsigned) { return 0; }
API int nvmlShutdown() { return 0; }
API const char* nvmlErrorString(int) { return "emulated error"; }
API int nvmlSystemGetDriverVersion(char* text, unsigned length) { snprintf(text, length, "emulated"); return 0; }
API int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = CUDART_VERSION; return 0; }
API int nvmlDeviceGetCount_v2(unsigned* count) { *count = 1; return 0; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned, void** handle) { *handle = (void*)1; return 0; }
API int nvmlDeviceGetHandleByUUID(const char*, void** handle) { *handle = (void*)1; return 0; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** handle) { *handle = (void*)1; return 0; }
API int nvmlDeviceGetName(void*, char* text, unsigned length) { snprintf(text, length, "%s", card_name()); return 0; }
API int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) { *major = MAJOR; *minor = MINOR; return 0; }
API int nvmlDeviceGetMemoryInfo_v2(void*, NvmlMemory* found) {
    std::lock_guard<std::mutex> guard(lock);
    unsigned long long taken = std::min(card_bytes, used + context);
    *found = {found->version, card_bytes, 0, card_bytes - taken, taken};
    return 0;
}
API int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, NvmlProcess* found) {
    std::lock_guard<std::mutex> guard(lock);
    unsigned room = *count;
    *count = context ? 1 : 0;
    if (*count > room) return 7;  // too little room for the answer
    if (*count) found[0] = {(unsigned)getpid(), used + context, {}};
    return 0;
}
API int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { *count = 0; return 0; }  // torch asks when memory runs out
static const int NVML_NOT_SUPPORTED = 3;
struct NvmlFabric { unsigned version; unsigned char cluster[16]; int status; unsigned clique; unsigned char state; };
API int nvmlDeviceGetGpuFabricInfoV(void*, NvmlFabric* found) { found->state = 0; return 0; }  // known to NVML, and not supported
API int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, void*) { return NVML_NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return NVML_NOT_SUPPORTED; }
