/* A T4 that computes nothing, for tests on machines without a GPU.
 *
 * Preloaded, it takes the place of the functions of CUDA's runtime and cuBLAS that torch calls; all else stays NVIDIA's own
 * and reports that there is no card. The card's memory is address space that nobody may touch, so that code on the CPU that
 * follows a pointer to the card ends at once. It is counted, and runs out. Kernels do nothing, copies to the card carry
 * nothing, and what is read from it is zero; see read_back for the one exception.
 *
 * GPU_STANDIN_BYTES: the card's memory. GPU_STANDIN_TAKEN: what another program holds of it. GPU_STANDIN_SHARED: a file through
 * which processes take from the same card; without it they do not see each other's. gpu_standin_waits() says how often this
 * process has waited for the card, gpu_standin_pageable_copies() how often it has copied to it from memory that is not pinned,
 * which a real card may make wait.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CUDA_VERSION_HERE = 13000, MULTIPROCESSORS = 40, MAJOR = 7, MINOR = 5 };
static const size_t T4_BYTES = 15835660288, CONTEXT_BYTES = 250ul << 20, CUBLAS_BYTES = 8ul << 20;

/* ---- What is taken of memory: the card's, and pinned memory of the host. */

typedef struct block {
    char *start;
    size_t bytes;
    struct block *next;
} block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block *on_card, *pinned;
static size_t used_bytes; /* by this process */
static bool has_context;
static atomic_long waits, pageable_copies;

/* Of all processes on the card: what they use now, and did at their most. */
typedef struct {
    atomic_size_t used, peak;
} shared_card;

static shared_card alone, *taken = &alone;
static pid_t self;
static _Thread_local cudaError_t last_error;

static cudaError_t result(cudaError_t error) {
    return error == cudaSuccess ? error : (last_error = error);
}

static size_t setting(const char *name, size_t otherwise) {
    const char *given = getenv(name);
    return given ? strtoull(given, NULL, 10) : otherwise;
}

static size_t card_bytes(void) {
    return setting("GPU_STANDIN_BYTES", T4_BYTES);
}

__attribute__((constructor)) static void join_card(void) {
    const char *file = getenv("GPU_STANDIN_SHARED");
    self = getpid();
    if (!file) return;
    int opened = open(file, O_RDWR | O_CREAT, 0600);
    if (opened < 0 || ftruncate(opened, sizeof *taken)) abort();
    taken = mmap(NULL, sizeof *taken, PROT_READ | PROT_WRITE, MAP_SHARED, opened, 0);
    if (taken == MAP_FAILED) abort();
    close(opened);
}

static size_t free_bytes(void) {
    size_t used = taken->used + setting("GPU_STANDIN_TAKEN", 0);
    return used < card_bytes() ? card_bytes() - used : 0;
}

/* With the lock held. */
static void give_back(size_t bytes) {
    used_bytes -= bytes;
    taken->used -= bytes;
}

__attribute__((destructor)) static void leave_card(void) {
    if (getpid() == self) give_back(used_bytes); /* and not one that was forked from this process */
}

/* Takes part of the card, after the context that the first call makes; with the lock held. */
static bool take(size_t bytes) {
    size_t more = bytes + (has_context ? 0 : CONTEXT_BYTES);
    size_t used = taken->used += more, peak = taken->peak;
    if (used + setting("GPU_STANDIN_TAKEN", 0) > card_bytes()) {
        taken->used -= more;
        return false;
    }
    while (used > peak && !atomic_compare_exchange_weak(&taken->peak, &peak, used)) continue;
    used_bytes += more;
    has_context = true;
    return true;
}

static bool take_locked(size_t bytes) {
    pthread_mutex_lock(&lock);
    bool fits = take(bytes);
    pthread_mutex_unlock(&lock);
    return fits;
}

static void add(block **list, void *start, size_t bytes) {
    block *added = malloc(sizeof *added);
    *added = (block){start, bytes, *list};
    *list = added;
}

/* The size of the block that was there, 0 if there was none. */
static size_t removed(block **list, const void *start) {
    for (block **at = list; *at; at = &(*at)->next) {
        if ((*at)->start != start) continue;
        block *found = *at;
        size_t bytes = found->bytes;
        *at = found->next;
        free(found);
        return bytes;
    }
    return 0;
}

static bool is_within(const block *list, const void *place) {
    pthread_mutex_lock(&lock);
    for (; list; list = list->next)
        if ((const char *)place >= list->start && (const char *)place < list->start + list->bytes) break;
    pthread_mutex_unlock(&lock);
    return list != NULL;
}

cudaError_t cudaMalloc(void **place, size_t bytes) {
    void *found = MAP_FAILED;
    pthread_mutex_lock(&lock);
    if (take(bytes)) {
        found = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED)
            give_back(bytes);
        else
            add(&on_card, found, bytes);
    }
    pthread_mutex_unlock(&lock);
    if (found == MAP_FAILED) return result(cudaErrorMemoryAllocation);
    *place = found;
    return cudaSuccess;
}

cudaError_t cudaFree(void *place) {
    pthread_mutex_lock(&lock);
    size_t bytes = removed(&on_card, place);
    give_back(bytes);
    pthread_mutex_unlock(&lock);
    if (bytes) munmap(place, bytes);
    return bytes || !place ? cudaSuccess : result(cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    if (!take_locked(0)) return result(cudaErrorMemoryAllocation);
    *total = card_bytes();
    *available = free_bytes();
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **place, size_t bytes, unsigned flags) {
    if (posix_memalign(place, 4096, bytes)) return result(cudaErrorMemoryAllocation);
    pthread_mutex_lock(&lock);
    add(&pinned, *place, bytes);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *place) {
    pthread_mutex_lock(&lock);
    removed(&pinned, place);
    pthread_mutex_unlock(&lock);
    free(place);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
    memset(found, 0, sizeof *found);
    bool is_on_card = is_within(on_card, place), is_pinned = is_within(pinned, place);
    found->type = is_on_card ? cudaMemoryTypeDevice : is_pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->devicePointer = is_on_card || is_pinned ? (void *)place : NULL;
    found->hostPointer = is_pinned ? (void *)place : NULL;
    return cudaSuccess;
}

/* Zeros, but for an odd number of bytes, more than one, which only flags have: those are set. A query of an evaluation counts
 * only where the card says so; without one that counts its recall would be no number, and a sweep would end there. */
static void read_back(void *to, size_t bytes) {
    memset(to, bytes > 1 && bytes % 2, bytes);
}

static cudaError_t copy(void *to, const void *from, size_t bytes) {
    if (is_within(on_card, to)) {
        if (!is_within(on_card, from) && !is_within(pinned, from)) pageable_copies++;
        return cudaSuccess;
    }
    if (is_within(on_card, from))
        read_back(to, bytes);
    else
        memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    waits++;
    return copy(to, from, bytes);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *place, int value, size_t bytes) {
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *place, int value, size_t bytes, cudaStream_t stream) {
    return cudaSuccess;
}

/* ---- The card. */

static _Thread_local int device;

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *number) {
    *number = device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int number) {
    if (number != 0) return result(cudaErrorInvalidDevice);
    return take_locked(0) ? cudaSuccess : result(cudaErrorMemoryAllocation);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int number) {
    *card = (struct cudaDeviceProp){
        .name = "Tesla T4",
        .totalGlobalMem = card_bytes(),
        .major = MAJOR,
        .minor = MINOR,
        .multiProcessorCount = MULTIPROCESSORS,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .maxThreadsPerMultiProcessor = 1024,
        .maxBlocksPerMultiProcessor = 16,
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlock = 49152,
        .sharedMemPerBlockOptin = 65536,
        .sharedMemPerMultiprocessor = 65536,
        .l2CacheSize = 4 << 20,
        .unifiedAddressing = 1,
        .canMapHostMemory = 1,
        .streamPrioritiesSupported = 1,
    };
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 65536; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

/* ---- The driver, of which torch asks for single functions by name. */

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice number, unsigned *flags, int *is_active) {
    *flags = 0;
    *is_active = has_context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = has_context ? (CUcontext)&has_context : NULL;
    return CUDA_SUCCESS;
}

static CUresult nothing(void) {
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    *function = (void *)nothing;
    if (!strcmp(name, "cuDevicePrimaryCtxGetState")) *function = (void *)cuDevicePrimaryCtxGetState;
    if (!strcmp(name, "cuCtxGetCurrent")) *function = (void *)cuCtxGetCurrent;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- Kernels. */

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 threads, void **arguments, size_t shared, cudaStream_t stream) {
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *where, const void *kernel, void **arguments) {
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 threads, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    *found = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = 32,
        .maxDynamicSharedSizeBytes = 65536,
        .binaryVersion = 10 * MAJOR + MINOR,
        .ptxVersion = 10 * MAJOR + MINOR,
    };
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int threads, size_t shared,
                                                                   unsigned flags) {
    *count = 2;
    return cudaSuccess;
}

/* ---- Streams and events: all is done as soon as it is asked for. */

static void *new_handle(void) {
    static atomic_ulong count;
    return (void *)(0x1000 + 16 * ++count);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 10;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    function(argument);
    return cudaSuccess;
}

#define DONE(name, ...) \
    cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define WAITED(name, ...) \
    cudaError_t name(__VA_ARGS__) { \
        waits++; \
        return cudaSuccess; \
    }
WAITED(cudaDeviceSynchronize, void)
WAITED(cudaStreamSynchronize, cudaStream_t stream)
WAITED(cudaEventSynchronize, cudaEvent_t event)
DONE(cudaStreamQuery, cudaStream_t stream)
DONE(cudaStreamDestroy, cudaStream_t stream)
DONE(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags)
DONE(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
DONE(cudaEventRecord, cudaEvent_t event, cudaStream_t stream)
DONE(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned flags)
DONE(cudaEventQuery, cudaEvent_t event)
DONE(cudaEventDestroy, cudaEvent_t event)

long gpu_standin_waits(void) {
    return waits;
}

long gpu_standin_pageable_copies(void) {
    return pageable_copies;
}

/* ---- cuBLAS: 0 is success. Its header is left out, since arguments are, too: nobody reads those that are not named here. */

enum { CUBLAS_NOT_INITIALIZED = 1 };

/* A handle has memory of its own on the card. */
int cublasCreate_v2(void **handle) {
    if (!take_locked(CUBLAS_BYTES)) return CUBLAS_NOT_INITIALIZED;
    *handle = new_handle();
    return 0;
}

int cublasGetMathMode(void *handle, int *mode) {
    return *mode = 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    return *mode = 0;
}

#define MADE(name) \
    int name(void **made) { \
        *made = new_handle(); \
        return 0; \
    }
MADE(cublasLtMatmulDescCreate)
MADE(cublasLtMatrixLayoutCreate)
MADE(cublasLtMatmulPreferenceCreate)

struct heuristic {
    unsigned long algorithm[8];
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, struct heuristic *found, int *count) {
    memset(found, 0, sizeof *found);
    *count = 1;
    return 0;
}

#define COMPUTED(name) \
    int name(void) { return 0; }
COMPUTED(cublasDestroy_v2)
COMPUTED(cublasSetStream_v2)
COMPUTED(cublasSetWorkspace_v2)
COMPUTED(cublasSetMathMode)
COMPUTED(cublasSetPointerMode_v2)
COMPUTED(cublasSgemm_v2)
COMPUTED(cublasDgemm_v2)
COMPUTED(cublasGemmEx)
COMPUTED(cublasSgemmStridedBatched)
COMPUTED(cublasGemmStridedBatchedEx)
COMPUTED(cublasLtMatmul)
COMPUTED(cublasLtMatmulDescSetAttribute)
COMPUTED(cublasLtMatmulDescDestroy)
COMPUTED(cublasLtMatrixLayoutSetAttribute)
COMPUTED(cublasLtMatrixLayoutDestroy)
COMPUTED(cublasLtMatmulPreferenceSetAttribute)
COMPUTED(cublasLtMatmulPreferenceDestroy)

/* ---- torch: cuDNN, which the card has not, is off, as with torch.backends.cudnn.enabled = False. at::Context::userEnabledCuDNN */

bool _ZNK2at7Context16userEnabledCuDNNEv(const void *context) {
    return false;
}
