// The host logic of csrc/ for pytest: a table made in Python, the fake driver, and thin wrappers. Never shipped.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <deque>
#include <new>

#include "driver.h"
#include "fake_driver.h"
#include "kernel.h"

namespace py = pybind11;
using namespace simplex;

static thread_local long allocations = 0;

void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

Span<Kernel> table;

// A generated table is static; so is one from Python: kernels and their strings are never freed.
const char* keep(const std::string& text) {
  static std::deque<std::string> kept;
  return kept.emplace_back(text).c_str();
}

template <class T>
Span<T> keep(const std::vector<T>& values) {
  T* copy = new T[values.size()];
  std::copy(values.begin(), values.end(), copy);
  return {copy, values.size()};
}

Span<Constant> constants(const py::handle& items) {
  std::vector<Constant> out;
  for (const auto& [name, value] : items.cast<std::vector<std::pair<std::string, int64_t>>>()) {
    out.push_back({keep(name), value});
  }
  return keep(out);
}

Span<Param> params(const py::handle& items) {
  std::vector<Param> out;
  for (const auto& [name, type, divisibility] : items.cast<std::vector<std::tuple<std::string, ParamType, int>>>()) {
    out.push_back({keep(name), type, divisibility});
  }
  return keep(out);
}

Span<TensorMapMeta> tensor_maps(const py::handle& items) {
  std::vector<TensorMapMeta> out;
  for (const auto& item : items) {
    out.push_back({item["swizzle"].cast<int>(), item["elem_size"].cast<int>(), item["elem_type"].cast<int>(),
                   item["fp4_padded"].cast<bool>(), keep(item["block_size"].cast<std::vector<int32_t>>())});
  }
  return keep(out);
}

std::vector<const Kernel*> set_table(const std::vector<py::dict>& rows) {
  static const unsigned char bytes[4096] = {};
  static size_t next = 0;
  Kernel* kernels = new Kernel[rows.size()]{};
  std::vector<const Kernel*> out;
  for (size_t i = 0; i < rows.size(); ++i) {
    const py::dict& row = rows[i];
    auto text = [&](const char* name) { return keep(row[name].cast<std::string>()); };
    auto number = [&](const char* name) { return row[name].cast<int>(); };
    Kernel& k = kernels[i];
    k.name = text("name");
    k.family = text("family");
    k.symbol = text("symbol");
    k.arch = number("arch");
    k.arch_suffix = *text("arch_suffix");
    k.num_warps = number("num_warps");
    k.num_ctas = number("num_ctas");
    k.shared = number("shared");
    k.cooperative = number("cooperative");
    k.pdl = number("pdl");
    k.key = constants(row["key"]);
    k.tile = constants(row["tile"]);
    k.params = params(row["params"]);
    k.tensor_maps = tensor_maps(row["tensor_maps"]);
    k.cubin = bytes + next++ % sizeof(bytes);  // an address of its own: the fake driver tells cubins apart by it
    k.cubin_size = 1;
    out.push_back(&k);
  }
  table = {kernels, rows.size()};
  return out;
}

const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }

std::vector<Arg> arguments(const std::vector<py::tuple>& items) {
  std::vector<Arg> out;
  for (const py::tuple& item : items) {
    const char* name = keep(item[0].cast<std::string>());
    switch (item[1].cast<ParamType>()) {
      case ParamType::Pointer:
        out.emplace_back(name, address(item[2].cast<uintptr_t>()));
        break;
      case ParamType::I32:
        out.emplace_back(name, item[2].cast<int32_t>());
        break;
      case ParamType::I64:
        out.emplace_back(name, item[2].cast<int64_t>());
        break;
      case ParamType::F32:
        out.emplace_back(name, item[2].cast<float>());
        break;
      case ParamType::TensorMap:
        out.emplace_back(name, item[2].cast<TensorDescriptor>());
        break;
    }
  }
  return out;
}

void launch_from_python(const Kernel& kernel, int device, uintptr_t stream, std::array<unsigned, 3> grid,
                        const std::vector<py::tuple>& items) {
  const std::vector<Arg> args = arguments(items);
  py::gil_scoped_release release;
  launch(kernel, device, reinterpret_cast<void*>(stream), grid, Span<Arg>(args.data(), args.size()));
}

// (nanoseconds, allocations) of one find + launch, averaged.
std::pair<double, double> cost(const KernelFamily& family, int device, int64_t dtype, int64_t dim,
                               const std::vector<py::tuple>& items, int repeats) {
  const std::vector<Arg> args = arguments(items);
  fake().recording = false;
  const long before = allocations;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) {
    launch(family.find(device, {dtype, dim}), device, nullptr, {1, 1, 1}, Span<Arg>(args.data(), args.size()));
  }
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  const double allocated = allocations - before;
  fake().recording = true;
  return {elapsed.count() / repeats, allocated / repeats};
}

}  // namespace

namespace simplex {
Span<Kernel> kernel_table() { return table; }
}  // namespace simplex

PYBIND11_MODULE(simplex_host, m) {
  py::enum_<ParamType>(m, "ParamType")
      .value("Pointer", ParamType::Pointer)
      .value("I32", ParamType::I32)
      .value("I64", ParamType::I64)
      .value("F32", ParamType::F32)
      .value("TensorMap", ParamType::TensorMap);
  using One = std::array<int64_t, 1>;
  using Two = std::array<int64_t, 2>;
  using Three = std::array<int64_t, 3>;
  py::class_<TensorDescriptor>(m, "TensorDescriptor")
      .def(py::init(
          [](uintptr_t data, Two n, Two s) { return TensorDescriptor(address(data), {n[0], n[1]}, {s[0], s[1]}); }))
      .def(py::init([](uintptr_t data, Three n, Three s) {
        return TensorDescriptor(address(data), {n[0], n[1], n[2]}, {s[0], s[1], s[2]});
      }))
      .def(
          py::init([](uintptr_t data, Two n, One s) { return TensorDescriptor(address(data), {n[0], n[1]}, {s[0]}); }));
  py::class_<Kernel, std::unique_ptr<Kernel, py::nodelete>>(m, "Kernel")
      .def_property_readonly("name", [](const Kernel& k) { return k.name; })
      .def_property_readonly("cubin", [](const Kernel& k) { return reinterpret_cast<uintptr_t>(k.cubin); })
      .def("__getitem__", [](const Kernel& k, const std::string& name) { return k[name.c_str()]; });
  py::class_<KernelFamily>(m, "KernelFamily")
      .def(py::init([](const std::string& family) { return new KernelFamily(keep(family), {"dtype", "HEAD_DIM"}); }))
      .def(
          "find",
          [](const KernelFamily& f, int device, int64_t dtype, int64_t dim) { return &f.find(device, {dtype, dim}); },
          py::return_value_policy::reference, py::call_guard<py::gil_scoped_release>())
      .def("cost", &cost);
  m.def("set_table", &set_table, py::return_value_policy::reference);
  m.def("try_kernel", &simplex_try_kernel, py::arg("kernel").none(true));
  m.def("launch", &launch_from_python);
  m.def("load_driver", [](const std::string& library) {
    static Driver loaded;
    loaded = load_driver(library.c_str());
    replace_driver(&loaded);
  });
  m.def("driver_version", [] { return driver().version; });

  m.def("reset", [](int version, const std::vector<std::tuple<int, int, int>>& devices) {
    fake() = FakeDriver{};
    fake().version = version;
    for (const auto& [major, minor, shared] : devices) fake().devices.push_back({major, minor, shared});
  });
  m.def("set_param_sizes", [](const std::vector<int>& sizes) { fake().param_sizes = sizes; });
  m.def("fail", [](const std::string& function, int result) { fake().failures[function] = result; });
  m.def("set_thread", &set_thread);
  m.def("calls", [] {
    py::list out;
    for (const Call& call : fake().calls) {
      py::dict values;
      for (const auto& [name, value] : call.values) {
        if (const auto* bytes = std::get_if<std::vector<std::string>>(&value)) {
          py::list items;
          for (const std::string& b : *bytes) items.append(py::bytes(b));
          values[name.c_str()] = items;
        } else {
          values[name.c_str()] = value;
        }
      }
      out.append(py::make_tuple(call.function, values));
    }
    return out;
  });
}
