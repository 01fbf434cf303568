#include "kernel.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"

namespace simplex {

namespace {

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

std::string constant_string(const char* name, int64_t value) {
  static const char* const kDTypes[] = {"fp32", "fp16", "bf16"};
  const bool dtype = same(name, "dtype") && value >= 0 && value < 3;
  return std::string(name) + "=" + (dtype ? kDTypes[value] : std::to_string(value));
}

std::string arch_string(const Kernel& kernel) {
  std::string text = "sm_" + std::to_string(kernel.arch);
  if (kernel.arch_suffix) text += kernel.arch_suffix;
  return text;
}

struct DeviceInfo {
  int major, minor;
  int shared;  // what a block may opt in to, bytes
};

void check_device(int device) {
  if (device < 0 || device >= kMaxDevices) {
    throw std::runtime_error("simplex_ops: expected a CUDA device index below " + std::to_string(kMaxDevices) +
                             ", got " + std::to_string(device));
  }
}

DeviceInfo device_info(int device) {
  const Driver& cu = driver();
  auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    const CUresult result = cu.cuDeviceGetAttribute(&value, which, device);
    if (result != CUDA_SUCCESS) {
      throw_driver_error("simplex_ops: device " + std::to_string(device), "cuDeviceGetAttribute", result);
    }
    return value;
  };
  return {attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
          attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
          attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)};
}

// A cubin runs within its major version from its own minor version on; one built for an `a` target only on that very
// chip.
bool runs_on(const Kernel& kernel, const DeviceInfo& info) {
  const int major = kernel.arch / 10, minor = kernel.arch % 10;
  return major == info.major && (kernel.arch_suffix == 'a' ? minor == info.minor : minor <= info.minor);
}

// Of two rows that run, the newer target knows more of the chip, and so does the more specific one: sm_90 < sm_90f <
// sm_90a.
int preference(const Kernel& kernel) {
  return 3 * kernel.arch + (kernel.arch_suffix == 'a' ? 2 : kernel.arch_suffix == 'f' ? 1 : 0);
}

bool has_key(const Kernel& kernel, const int64_t* key) {
  return std::equal(kernel.key.begin(), kernel.key.end(), key,
                    [](const Constant& c, int64_t value) { return c.value == value; });
}

std::atomic<const Kernel*> on_trial{nullptr};

}  // namespace

bool simplex_try_kernel(const Kernel* kernel) {
  const Kernel* before = on_trial.exchange(kernel, std::memory_order_acq_rel);
  return before && before->loaded.devices.load(std::memory_order_acquire);
}

int64_t Kernel::operator[](const char* constant) const {
  for (const auto& constants : {key, tile}) {
    for (const Constant& c : constants) {
      if (same(c.name, constant)) return c.value;
    }
  }
  throw std::runtime_error(std::string(name) + ": has no constant named " + constant);
}

struct KernelFamily::Candidate {
  std::array<int64_t, kMaxKeys> key;
  const Kernel* kernel;
};

KernelFamily::KernelFamily(const char* family, std::initializer_list<const char*> key_names)
    : family_(family), num_keys_(key_names.size()), key_names_{} {
  if (num_keys_ > kMaxKeys) throw std::runtime_error(std::string(family) + ": more than kMaxKeys key names");
  std::copy(key_names.begin(), key_names.end(), key_names_.begin());
}

const Kernel& KernelFamily::find(int device, std::initializer_list<int64_t> key) const {
  if (const Kernel* kernel = find_if(device, key)) return *kernel;
  throw_not_found(device, key.begin());
}

const Kernel* KernelFamily::find_if(int device, std::initializer_list<int64_t> key) const {
  if (key.size() != num_keys_) {
    throw std::runtime_error(std::string(family_) + ": expected a key of " + std::to_string(num_keys_) +
                             " values, got " + std::to_string(key.size()));
  }
  const Kernel* trial = on_trial.load(std::memory_order_acquire);
  if (trial && same(trial->family, family_)) {
    check_key_names(*trial);
    if (has_key(*trial, key.begin())) return trial;
  }
  for (const Candidate& candidate : candidates(device)) {
    if (std::equal(key.begin(), key.end(), candidate.key.begin())) return candidate.kernel;
  }
  return nullptr;
}

const Span<KernelFamily::Candidate>& KernelFamily::candidates(int device) const {
  check_device(device);
  auto& published = candidates_[device];
  if (const auto* known = published.load(std::memory_order_acquire)) return *known;

  std::lock_guard<std::mutex> lock(mutex_);
  if (const auto* known = published.load(std::memory_order_acquire)) return *known;
  const DeviceInfo info = device_info(device);
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : kernel_table()) {
    if (!same(kernel.family, family_)) continue;
    check_key_names(kernel);
    if (runs_on(kernel, info) && kernel.shared <= info.shared) kernels.push_back(&kernel);
  }
  std::stable_sort(kernels.begin(), kernels.end(),
                   [](const Kernel* a, const Kernel* b) { return preference(*a) > preference(*b); });

  auto* rows = new Candidate[kernels.size()];
  for (size_t i = 0; i < kernels.size(); ++i) {
    rows[i].kernel = kernels[i];
    for (size_t k = 0; k < num_keys_; ++k) rows[i].key[k] = kernels[i]->key[k].value;
  }
  const auto* span = new Span<Candidate>(rows, kernels.size());
  published.store(span, std::memory_order_release);
  return *span;
}

void KernelFamily::check_key_names(const Kernel& kernel) const {
  const bool match = kernel.key.size == num_keys_ &&
                     std::equal(kernel.key.begin(), kernel.key.end(), key_names_.begin(),
                                [](const Constant& c, const char* name) { return same(c.name, name); });
  if (match) return;
  std::string expected;
  for (size_t k = 0; k < num_keys_; ++k) expected += std::string(k ? ", " : "") + key_names_[k];
  throw std::runtime_error(std::string(kernel.name) + ": expected a kernel of this family to be keyed by " + expected);
}

void KernelFamily::throw_not_found(int device, const int64_t* key) const {
  const DeviceInfo info = device_info(device);
  std::set<std::string> archs;
  int smallest = INT_MAX;
  bool known_key = false;
  for (const Kernel& kernel : kernel_table()) {
    if (!same(kernel.family, family_)) continue;
    archs.insert(arch_string(kernel));
    if (!has_key(kernel, key)) continue;
    known_key = true;
    if (runs_on(kernel, info)) smallest = std::min(smallest, kernel.shared);
  }

  std::string text = std::string(family_) + ": no kernel for";
  for (size_t k = 0; k < num_keys_; ++k) text += " " + constant_string(key_names_[k], key[k]);
  text += " on CUDA device " + std::to_string(device) + " (compute capability " + std::to_string(info.major) + "." +
          std::to_string(info.minor) + ", " + std::to_string(info.shared) + " bytes of shared memory)";
  if (smallest != INT_MAX) text += "; the smallest one needs " + std::to_string(smallest) + " bytes of shared memory";
  if (!known_key) text += "; no architecture has this combination";
  text += "; this build has kernels for";
  for (const std::string& arch : archs) text += (arch == *archs.begin() ? " " : ", ") + arch;
  throw std::runtime_error(text + (archs.empty() ? " none" : ""));
}

}  // namespace simplex
