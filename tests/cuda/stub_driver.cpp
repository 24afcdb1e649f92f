// The functions of libcuda.so.1 that itm_fast._cuda calls, for machines without a GPU: a launch hands the kernel's name
// and argument to a function of the test's choice, such as one that runs the kernel's source on the CPU.
//
// It has two devices, and refuses what the driver refuses: a launch without a context or beyond the limits of an H200,
// code that is not an ELF file, and what itm_stub_fail asks it to. "\x7fELFstub" and a name is code for that kernel.
#include <cstring>
#include <string>

namespace {

enum { OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
constexpr int DEVICES = 2, MOST_SHARED = 227 << 10, SHARED_UNASKED = 48 << 10, MOST_THREADS = 1024, MOST_Y = 65535;
constexpr char CODE[] = "\x7f" "ELFstub";

using Run = int (*)(const char *name, const void *problem, unsigned grid_x, unsigned grid_y, unsigned threads,
                    unsigned shared, unsigned order);
struct Module { std::string code; };
struct Function { std::string name; int shared = SHARED_UNASKED; const void *context = nullptr; };
struct Fault { std::string name; int code = 0; };

int contexts[DEVICES];  // their addresses are the devices' contexts
thread_local const void *current = nullptr;
Run run = nullptr;
unsigned order = 0;
Fault fault;

// The code that the function `name` is to fail with now.
int failing(const char *name) {
    if (fault.name != name) return OK;
    fault.name.clear();
    return fault.code;
}

const char *const ERRORS[][3] = {
    {"1", "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {"2", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {"100", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {"200", "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {"201", "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {"500", "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {"719", "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};
int described(int code, const char **text, int column) {
    for (auto &row : ERRORS)
        if (std::to_string(code) == row[0]) return *text = row[column], OK;
    return *text = nullptr, INVALID_VALUE;
}

}  // namespace

extern "C" {

// What tests say to the stand-ins.
void itm_stub_run(Run chosen, unsigned chosen_order) { run = chosen, order = chosen_order; }
void itm_stub_fail(const char *name, int code) { fault = {name, code}; }

int cuInit(unsigned) { return failing("cuInit"); }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuGetErrorName(int code, const char **text) { return described(code, text, 1); }
int cuGetErrorString(int code, const char **text) { return described(code, text, 2); }
int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_VALUE;
    return *device = ordinal, OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &contexts[device], OK; }
int cuCtxSetCurrent(void *context) { return current = context, OK; }
int cuModuleLoadData(Module **module, const char *code) {
    if (int wrong = failing("cuModuleLoadData")) return wrong;
    if (!current) return INVALID_CONTEXT;
    if (std::memcmp(code, CODE, 4)) return INVALID_IMAGE;
    return *module = new Module{code}, OK;
}
int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    bool ours = module->code.rfind(CODE, 0) == 0;  // of a real cubin the first bytes alone are known
    if (ours && module->code != CODE + std::string(name)) return NOT_FOUND;
    *function = new Function{name};
    (*function)->context = current;
    return OK;
}
int cuFuncSetAttribute(Function *function, int attribute, int value) {
    if (attribute != 8 || value > MOST_SHARED) return INVALID_VALUE;
    return function->shared = value, OK;
}
int cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra) {
    if (int wrong = failing("cuLaunchKernel")) return wrong;
    if (current != function->context) return INVALID_CONTEXT;
    bool empty = !x || !y || !threads, large = y > MOST_Y || threads > MOST_THREADS || int(shared) > function->shared;
    if (empty || large || z != 1 || threads_y != 1 || threads_z != 1 || stream || extra) return INVALID_VALUE;
    return run && run(function->name.c_str(), arguments[0], x, y, threads, shared, order) == 0 ? OK : LAUNCH_FAILED;
}

}  // extern "C"
