// A CUDA driver that launches nothing and remembers everything: what test_host.py looks at.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

struct FakeDevice {
  int major, minor, shared;
};

using Value = std::variant<int64_t, std::string, std::vector<int64_t>, std::vector<std::string>>;

struct Call {
  std::string function;
  std::map<std::string, Value> values;
};

struct FakeDriver {
  int version = 13010;
  std::vector<FakeDevice> devices;
  std::vector<int> param_sizes;         // bytes of each kernel parameter: the driver knows them from the cubin
  std::map<std::string, int> failures;  // function -> the CUresult it returns
  bool recording = true;
  std::vector<Call> calls;
};

// Only one test runs at a time; the calls themselves may come from several threads.
FakeDriver& fake();
// The calling thread's current context (0: none) and capture mode.
void set_thread(uintptr_t context, int capture_mode);
