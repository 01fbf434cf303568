#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace simplex {
namespace {

std::atomic<const Driver*> current{nullptr};

void* symbol(void* handle, const char* library, const char* name) {
  void* address = dlsym(handle, name);
  if (!address) {
    throw std::runtime_error(std::string("simplex_ops: ") + library + " has no " + name +
                             ": the kernels need an NVIDIA driver of CUDA 12.0 (525) or newer");
  }
  return address;
}

const char* or_unknown(const char* text) { return text ? text : "unknown"; }

}  // namespace

Driver load_driver(const char* library) {
  void* handle =
      dlopen(library, RTLD_NOW | RTLD_LOCAL);  // never closed: the kernels stay loaded as long as the process
  if (!handle) {
    throw std::runtime_error(std::string("simplex_ops: cannot load the NVIDIA driver ") + library + ": " +
                             or_unknown(dlerror()));
  }
  Driver d{};
#define SIMPLEX_LOOK_UP(name) d.name = reinterpret_cast<decltype(d.name)>(symbol(handle, library, #name));
  SIMPLEX_DRIVER_FUNCTIONS(SIMPLEX_LOOK_UP)
#undef SIMPLEX_LOOK_UP
  CUresult result = d.cuInit(0);
  if (result == CUDA_SUCCESS) result = d.cuDriverGetVersion(&d.version);
  if (result != CUDA_SUCCESS) {
    const char* name = nullptr;
    d.cuGetErrorName(result, &name);
    throw std::runtime_error(std::string("simplex_ops: ") + library + " does not start: " + or_unknown(name));
  }
  return d;
}

const Driver& driver() {
  const Driver* loaded = current.load(std::memory_order_acquire);
  if (loaded) return *loaded;
  static const Driver real = load_driver("libcuda.so.1");
  current.store(&real, std::memory_order_release);
  return real;
}

void replace_driver(const Driver* fake) { current.store(fake, std::memory_order_release); }

void throw_driver_error(const std::string& context, const char* call, CUresult result) {
  const Driver& cu = driver();
  const char *name = nullptr, *text = nullptr;
  cu.cuGetErrorName(result, &name);
  cu.cuGetErrorString(result, &text);
  throw std::runtime_error(context + ": " + call + " failed: " + or_unknown(name) + " (" + or_unknown(text) + ")");
}

}  // namespace simplex
