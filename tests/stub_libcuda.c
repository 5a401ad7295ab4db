/* A driver for machines without one: every call says that it is not initialised, so kvikio takes all memory for the host's. */
#define NOT_INITIALIZED 3
#define CALL(name) \
    int name(void) { return NOT_INITIALIZED; }

CALL(cuInit)
CALL(cuGetErrorName)
CALL(cuGetErrorString)
CALL(cuDeviceGet)
CALL(cuDeviceGetCount)
CALL(cuDeviceGetAttribute)
CALL(cuDevicePrimaryCtxRetain)
CALL(cuDevicePrimaryCtxRelease)
CALL(cuDevicePrimaryCtxRelease_v2)
CALL(cuCtxCreate_v2)
CALL(cuCtxCreate_v3)
CALL(cuCtxCreate_v4)
CALL(cuCtxDestroy_v2)
CALL(cuCtxPushCurrent_v2)
CALL(cuCtxPopCurrent_v2)
CALL(cuCtxGetCurrent)
CALL(cuCtxGetDevice)
CALL(cuPointerGetAttribute)
CALL(cuPointerGetAttributes)
CALL(cuMemGetAddressRange_v2)
CALL(cuMemHostAlloc)
CALL(cuMemFreeHost)
CALL(cuMemHostRegister_v2)
CALL(cuMemHostUnregister)
CALL(cuMemcpyAsync)
CALL(cuMemcpyHtoDAsync_v2)
CALL(cuMemcpyDtoHAsync_v2)
CALL(cuMemcpyBatchAsync)
CALL(cuMemcpyBatchAsync_v2)
CALL(cuStreamCreate)
CALL(cuStreamDestroy_v2)
CALL(cuStreamSynchronize)
CALL(cuEventCreate)
CALL(cuEventDestroy_v2)
CALL(cuEventRecord)
CALL(cuEventQuery)
CALL(cuEventSynchronize)
CALL(cuLaunchHostFunc)

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
