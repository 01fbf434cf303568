// 2-simplicial attention in a C++ program without Python.
//
//   simplex_example _C.so _autograd_X_Y.so model.pt2 model.pt
//
// Loads the ops of the wheel and their autograd binding, calls the op through the dispatcher, runs the same layer as an
// AOTInductor package and as TorchScript, and takes a step of gradient descent. All on the inputs of ramp(), which the
// Python side of tests/test_cpp.py can rebuild; every result is printed for it to compare.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <iomanip>
#include <iostream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

constexpr int64_t kWindow1 = 5, kWindow2 = 3;

void load(const char* library) {
  // Registers with the dispatcher as it loads; nothing is looked up in it.
  if (!dlopen(library, RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

using Attention = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& q, const at::Tensor& k1, const at::Tensor& k2,
                                                     const at::Tensor& v1, const at::Tensor& v2, c10::SymInt w1,
                                                     c10::SymInt w2, std::optional<double> scale,
                                                     const std::optional<at::Tensor>& cu_seqlens);

at::Tensor attention(const std::vector<at::Tensor>& x) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("simplex::two_simplicial_attention", "").typed<Attention>();
  const auto [out, lse] = op.call(x[0], x[1], x[2], x[3], x[4], kWindow1, kWindow2, std::nullopt, std::nullopt);
  return out;
}

// Distinct and reproducible in any language: sin(0), sin(1), ...
at::Tensor ramp(at::IntArrayRef shape, double start) {
  const int64_t size = c10::multiply_integers(shape);
  return (at::arange(size, at::kDouble) + start).sin().to(at::kFloat).view(shape);
}

void print(const char* name, const at::Tensor& t) {
  std::cout << name;
  const at::Tensor flat = t.detach().to(at::kDouble).flatten();
  for (int64_t i = 0; i < flat.numel(); ++i) std::cout << ' ' << flat[i].item<double>();
  std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("usage: simplex_example _C.so _autograd_X_Y.so model.pt2 model.pt");
  load(argv[1]);
  load(argv[2]);
  std::cout << std::setprecision(9);

  std::vector<at::Tensor> x = {ramp({2, 7, 4, 8}, 0)};  // q, k1, k2, v1, v2
  for (int i = 1; i < 5; ++i) x.push_back(ramp({2, 7, 2, 8}, 1000 * i));

  print("op", attention(x));

  torch::inductor::AOTIModelPackageLoader package(argv[3]);
  print("aot_inductor", package.run(x).at(0));

  torch::jit::Module scripted = torch::jit::load(argv[4]);
  print("torchscript", scripted.forward({x[0], x[1], x[2], x[3], x[4]}).toTensor());

  for (at::Tensor& t : x) t.requires_grad_();
  const at::Tensor loss = attention(x).square().sum();
  loss.backward();
  print("loss", loss);
  print("grad_q", x[0].grad());
  print("grad_v2", x[4].grad());
  {
    const at::NoGradGuard no_grad;
    for (at::Tensor& t : x) t.sub_(t.grad(), 0.01);
  }
  print("loss_after_step", attention(x).square().sum());
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
