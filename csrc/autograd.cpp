// Autograd and autocast for every op of the library, derived from the schemas: no op is named here.
//
// The convention: op X has X_backward, and each argument of X_backward is, by its name,
//   grad_<output of X>   the incoming gradient (`Tensor?`: None where there is none; `Tensor`: then zeros),
//   an input of X, or an output of X,
// and each return of X_backward is grad_<input of X>. An output without a grad_ argument is not differentiable, nor is
// any of an op without X_backward: they are constants to autograd. An op that writes to an argument says so in its
// schema, and autograd notices where somebody has saved what was there.
//
// The ops themselves use LibTorch's stable ABI, which has no autograd. This file needs the C++ API, whose ABI changes
// with every minor release of torch, so it is a small library of its own, built once per minor and loaded after _C.so.
// simplex_ops/_autograd.py does the same, slower, where no build fits the running torch.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using c10::Argument;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

// shared_ptr in torch 2.11, intrusive_ptr in 2.13.
using NodePtr = decltype(Edge::function);

template <class T, class... Args>
std::pair<T*, NodePtr> make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    T* node = new T(std::forward<Args>(args)...);
    // torch's own deleter, which frees a deep graph without recursion. Only those torches have it: found at
    // instantiation.
    return {node, NodePtr(node, [](auto* self) { deleteNode(self); })};
  } else {
    auto owner = c10::make_intrusive<T>(std::forward<Args>(args)...);
    T* node = owner.get();
    return {node, NodePtr(std::move(owner))};
  }
}

bool is_tensor(const Argument& argument) { return argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor()); }

bool is_written(const Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

std::optional<size_t> find(const std::vector<Argument>& arguments, const std::string& name) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == name) return i;
  }
  return std::nullopt;
}

// What a call of X_backward is made of.
struct Rule {
  enum class From { Grad, InputTensor, InputValue, Output };
  struct Source {
    From from;
    size_t index;  // Grad: among the differentiable outputs; else among the inputs or the outputs of X
    bool optional;
  };

  OperatorHandle backward;
  std::vector<Source> arguments;       // one per argument of X_backward
  std::vector<size_t> grad_of;         // per return of X_backward: the input of X that it belongs to
  std::vector<size_t> differentiable;  // outputs of X, ascending; the node's inputs in this order
  size_t num_inputs, num_outputs;

  Rule(const OperatorHandle& forward, const OperatorHandle& backward) : backward(backward) {
    const auto& inputs = forward.schema().arguments();
    const auto& outputs = forward.schema().returns();
    const auto& backward_schema = backward.schema();
    num_inputs = inputs.size();
    num_outputs = outputs.size();

    for (size_t i = 0; i < num_outputs; ++i) {
      if (find(backward_schema.arguments(), "grad_" + outputs[i].name())) differentiable.push_back(i);
    }
    for (const Argument& argument : backward_schema.arguments()) {
      const std::string& name = argument.name();
      const bool optional = argument.type()->kind() == c10::TypeKind::OptionalType;
      std::optional<size_t> index;
      for (size_t i = 0; i < differentiable.size(); ++i) {
        if (name == "grad_" + outputs[differentiable[i]].name()) index = i;
      }
      if (index) {
        arguments.push_back({From::Grad, *index, optional});
      } else if ((index = find(inputs, name))) {
        arguments.push_back({is_tensor(argument) ? From::InputTensor : From::InputValue, *index, optional});
      } else if ((index = find(outputs, name))) {
        arguments.push_back({From::Output, *index, optional});
      } else {
        TORCH_CHECK(false, backward_schema.name(), ": expected argument ", name,
                    " to be an input, an output or grad_<output> of ", forward.schema().name());
      }
    }
    for (const Argument& result : backward_schema.returns()) {
      auto index = result.name().rfind("grad_", 0) == 0 ? find(inputs, result.name().substr(5)) : std::nullopt;
      TORCH_CHECK(index, backward_schema.name(), ": expected return ", result.name(), " to be grad_<input> of ",
                  forward.schema().name());
      grad_of.push_back(*index);
    }
  }
};

// The node that X leaves in the graph. Engine threads share it, hence the lock, as in torch's own nodes.
class Backward : public Node {
 public:
  Backward(const Rule& rule, edge_list edges) : Node(std::move(edges)), rule_(rule) {
    tensors_.reserve(rule.arguments.size());
    values_.reserve(rule.arguments.size());
  }

  std::string name() const override { return rule_.backward.schema().name().substr(sizeof("simplex::") - 1); }

  void save_inputs(c10::ArrayRef<IValue> inputs) {
    for (const Rule::Source& source : rule_.arguments) {
      const IValue* input = &inputs[source.index];
      if (source.from == Rule::From::InputTensor) {
        tensors_.emplace_back(input->isNone() ? at::Tensor() : input->toTensor(), /*is_output=*/false);
      } else if (source.from == Rule::From::InputValue) {
        values_.push_back(*input);
      }
    }
  }

  // After set_history: an output refers back to this node, and SavedVariable must see that to avoid a cycle.
  void save_outputs(c10::ArrayRef<IValue> outputs) {
    for (const Rule::Source& source : rule_.arguments) {
      if (source.from == Rule::From::Output)
        outputs_.emplace_back(outputs[source.index].toTensor(), /*is_output=*/true);
    }
  }

  variable_list apply(variable_list&& grads) override {
    variable_list results(rule_.grad_of.size());
    bool any_grad = false;
    for (const at::Tensor& grad : grads) any_grad |= grad.defined();
    if (!any_grad) return results;

    Stack stack = unpack(std::move(grads));
    rule_.backward.callBoxed(stack);
    for (size_t i = 0; i < results.size(); ++i) {
      if (should_compute_output(i)) results[i] = std::move(stack[i]).toTensor();
    }
    return results;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : tensors_) saved.reset_data();
    for (SavedVariable& saved : outputs_) saved.reset_data();
  }

 private:
  Stack unpack(variable_list&& grads) {
    std::lock_guard<std::mutex> lock(mutex_);
    Stack stack;
    stack.reserve(rule_.arguments.size());
    auto tensor = tensors_.begin();
    auto output = outputs_.begin();
    auto value = values_.begin();
    for (const Rule::Source& source : rule_.arguments) {
      switch (source.from) {
        case Rule::From::Grad: {
          at::Tensor& grad = grads[source.index];
          if (!grad.defined() && !source.optional) grad = input_metadata(source.index).zeros_like();
          push_tensor(stack, std::move(grad));
          break;
        }
        case Rule::From::InputTensor:
          push_tensor(stack, (tensor++)->unpack());
          break;
        case Rule::From::Output:
          push_tensor(stack, (output++)->unpack(getptr()));
          break;
        case Rule::From::InputValue:
          stack.push_back(*value++);
          break;
      }
    }
    return stack;
  }

  static void push_tensor(Stack& stack, at::Tensor tensor) {
    tensor.defined() ? stack.emplace_back(std::move(tensor)) : stack.emplace_back();
  }

  const Rule& rule_;
  std::vector<SavedVariable> tensors_, outputs_;
  std::vector<IValue> values_;
};

bool requires_grad(const IValue& value) { return value.isTensor() && value.toTensor().requires_grad(); }

Edge gradient_edge(const IValue& value) {
  return requires_grad(value) ? torch::autograd::impl::gradient_edge(value.toTensor()) : Edge();
}

void redispatch_below_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

bool any_requires_grad(const OperatorHandle& op, c10::ArrayRef<IValue> inputs) {
  bool any = false;
  for (const IValue& input : inputs) {
    if (!input.isTensor()) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(input.toTensor()), op.schema().name(),
                                ": forward-mode AD (jvp) is not supported, use reverse mode");
    any |= input.toTensor().requires_grad();
  }
  return any && c10::GradMode::is_enabled();
}

// The Autograd kernel of X.
struct ForwardKernel : c10::OperatorKernel {
  explicit ForwardKernel(Rule rule) : rule(std::move(rule)) {}

  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto inputs = torch::jit::last(*stack, rule.num_inputs);
    if (!any_requires_grad(op, inputs)) return redispatch_below_autograd(op, keys, stack);

    edge_list edges;
    edges.reserve(rule.grad_of.size());
    for (size_t i : rule.grad_of) edges.push_back(gradient_edge(inputs[i]));
    auto [node, owner] = make_node<Backward>(rule, std::move(edges));
    node->save_inputs(inputs);

    redispatch_below_autograd(op, keys, stack);
    const auto outputs = torch::jit::last(*stack, rule.num_outputs);
    for (size_t i : rule.differentiable) torch::autograd::set_history(outputs[i].toTensor(), owner);
    node->save_outputs(outputs);
  }

  const Rule rule;
};

// The Autograd kernel of X_backward: first-order gradients only, so whoever differentiates them must be told.
struct BackwardKernel : c10::OperatorKernel {
  explicit BackwardKernel(const std::string& forward)
      : message(forward + " is not twice differentiable: " + forward + "_backward has no derivative") {}

  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto inputs = torch::jit::last(*stack, op.schema().arguments().size());
    if (!any_requires_grad(op, inputs)) return redispatch_below_autograd(op, keys, stack);

    edge_list edges;
    for (const IValue& input : inputs) {
      if (requires_grad(input)) edges.push_back(gradient_edge(input));
    }
    NodePtr error = make_node<torch::autograd::Error>(message, std::move(edges)).second;
    redispatch_below_autograd(op, keys, stack);
    for (const IValue& output : torch::jit::last(*stack, op.schema().returns().size())) {
      torch::autograd::set_history(output.toTensor(), error);
    }
  }

  const std::string message;
};

// The Autograd kernel of an op without X_backward.
struct ConstantKernel : c10::OperatorKernel {
  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto& arguments = op.schema().arguments();
    const auto inputs = torch::jit::last(*stack, arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      TORCH_CHECK(!is_written(arguments[i]) || !c10::GradMode::is_enabled() || !requires_grad(inputs[i]),
                  op.schema().name().substr(sizeof("simplex::") - 1), ": expected ", arguments[i].name(),
                  ", which is updated in place, not to require grad");
    }
    redispatch_below_autograd(op, keys, stack);
  }
};

// The ADInplaceOrView kernel of an op that writes to an argument: counts the change.
struct WritingKernel : c10::OperatorKernel {
  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto& arguments = op.schema().arguments();
    const auto inputs = torch::jit::last(*stack, arguments.size());
    std::vector<at::Tensor> written;
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (is_written(arguments[i])) written.push_back(inputs[i].toTensor());
    }
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
    }
    for (const at::Tensor& tensor : written) {
      if (!tensor.is_inference()) torch::autograd::impl::bump_version(tensor);  // such a one has no counter
    }
  }
};

// The Autocast kernel of X: floating tensors take the region's low precision. fp64 stays, as everywhere in torch.
struct AutocastKernel : c10::OperatorKernel {
  explicit AutocastKernel(c10::DeviceType device) : device(device) {}

  void operator()(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const auto dtype = at::autocast::get_autocast_dtype(device);
    const size_t num_inputs = op.schema().arguments().size();
    for (auto value = stack->end() - num_inputs; value != stack->end(); ++value) {
      if (value->isTensor()) *value = at::autocast::cached_cast(dtype, value->toTensor(), device);
    }
    op.callBoxed(stack);
  }

  const c10::DeviceType device;
};

// Registers the kernels of every op when the library is loaded; they live as long as the process.
struct Binding {
  using Library = torch::Library;
  Library autograd{Library::IMPL, "simplex", c10::DispatchKey::Autograd, __FILE__, __LINE__};
  Library written{Library::IMPL, "simplex", c10::DispatchKey::ADInplaceOrView, __FILE__, __LINE__};
  Library autocast_cpu{Library::IMPL, "simplex", c10::DispatchKey::AutocastCPU, __FILE__, __LINE__};
  Library autocast_cuda{Library::IMPL, "simplex", c10::DispatchKey::AutocastCUDA, __FILE__, __LINE__};

  template <class Kernel, class... Args>
  static void implement(Library& library, const std::string& op, Args&&... args) {
    library.impl(op.c_str(),
                 torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(std::forward<Args>(args)...)));
  }

  Binding() {
    auto& dispatcher = c10::Dispatcher::singleton();
    size_t count = 0;
    for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
      if (name.name.rfind("simplex::", 0) != 0 || !name.overload_name.empty()) continue;
      const auto forward = dispatcher.findSchema(name);
      if (!forward) continue;
      const auto& arguments = forward->schema().arguments();
      if (std::any_of(arguments.begin(), arguments.end(), is_written)) implement<WritingKernel>(written, name.name);
      const auto backward = dispatcher.findSchema({name.name + "_backward", ""});
      if (!backward) {
        if (!name.name.ends_with("_backward")) implement<ConstantKernel>(autograd, name.name);
        continue;
      }
      implement<ForwardKernel>(autograd, name.name, Rule(*forward, *backward));
      implement<BackwardKernel>(autograd, name.name + "_backward", name.name);
      implement<AutocastKernel>(autocast_cpu, name.name, c10::kCPU);
      implement<AutocastKernel>(autocast_cuda, name.name, c10::kCUDA);
      ++count;
    }
    TORCH_CHECK(count > 0, "simplex_ops: load _C.so, which defines the ops, before the autograd binding");
  }
};

const Binding binding;

}  // namespace
