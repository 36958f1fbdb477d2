// CUDA devices made of host memory, for a CPU build of PyTorch: for tests only.
//
// A tensor of such a device has the dispatch key CUDA and lies in host memory. Each operator does what CUDA's would check
// (one device for all, a generator of that device), then runs the CPU's kernel on the same memory. What a GPU would have
// done is counted: launches by operator, and waits of the host for the device.
//
// Not covered: streams and events (all is done at once), cuDNN's and cuBLAS' settings, NCCL, memory statistics.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using std::optional;

constexpr auto CUDA = c10::DeviceType::CUDA;

// ---- devices ----

thread_local DeviceIndex current = 0;

DeviceIndex device_count() {
  static const char* text = std::getenv("PRETENDED_CUDA");
  return static_cast<DeviceIndex>(text ? std::atoi(text) : 1);
}

DeviceIndex or_current(DeviceIndex index) { return index < 0 ? current : index; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr auto static_type = CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {CUDA, current}; }
  void setDevice(Device device) const override { current = or_current(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current = or_current(device.index()); }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, stream.device());
  }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (bytes && posix_memalign(&memory, 512, bytes)) throw std::bad_alloc();
    return {memory, memory, &std::free, Device(CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
// Never destroyed: tensors outlive this library when Python ends.
Allocator& memory = *new Allocator;

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) { device_ = Device(CUDA, or_current(index)); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return std::exchange(current, or_current(index)); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex index = -1) const override {
    static auto& all = *new std::vector<at::Generator>;
    while (static_cast<int>(all.size()) < device_count())
      all.push_back(at::make_generator<Generator>(static_cast<DeviceIndex>(all.size())));
    return all[or_current(index)];
  }
  at::Generator getNewGenerator(DeviceIndex index = -1) const override { return at::make_generator<Generator>(index); }
  void deviceSynchronize(DeviceIndex) const override;
};

// ---- counts ----

struct Counts {
  std::mutex lock;
  std::map<std::string, long> launches, waits;
  std::set<int> devices;

  void launch(const std::string& name, DeviceIndex device) {
    std::lock_guard<std::mutex> guard(lock);
    launches[name]++;
    devices.insert(device);
  }
  void wait(const std::string& name) {
    std::lock_guard<std::mutex> guard(lock);
    waits[name]++;
  }
};
Counts& counts = *new Counts;

void Hooks::deviceSynchronize(DeviceIndex) const { counts.wait("synchronize"); }

// Operators whose result has a size, or is a number, that the host must know.
bool waits_always(const std::string& name) {
  static const auto& names = *new std::set<std::string>{
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::bincount", "aten::repeat_interleave", "aten::equal", "aten::is_nonzero", "aten::_linalg_det"};
  return names.count(name) > 0;
}

// Operators that take indices on the CPU too; indices that are masks are counted on the device, and the host waits.
bool indexes(const std::string& name) {
  static const auto& names = *new std::set<std::string>{"aten::index", "aten::index_put", "aten::index_put_",
      "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

// ---- the same memory as the CPU's ----

Tensor on_host(const Tensor& tensor) {
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
      c10::DataPtr(tensor.storage().mutable_data(), Device(c10::kCPU)), nullptr, false);
  auto host = at::detail::make_tensor<at::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  return host;
}

bool is_cuda(const Tensor& tensor) { return tensor.defined() && tensor.is_cuda(); }
Tensor seen_by_host(const Tensor& tensor) { return is_cuda(tensor) ? on_host(tensor) : tensor; }

Tensor empty_memory_format(c10::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>,
    optional<Device> device, optional<bool>, optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, optional<at::ScalarType> dtype,
    optional<at::Layout>, optional<Device> device, optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_cuda() && source.is_cuda()) {
    counts.launch("copy_", self.device().index());
  } else {
    const std::string way = self.is_cuda() ? "copy to device" : "copy to host";
    counts.launch(way, (self.is_cuda() ? self : source).device().index());
    if (!non_blocking) counts.wait(way);
  }
  auto to = seen_by_host(self);
  const auto from = seen_by_host(source);
  at::AutoDispatchBelowADInplaceOrView guard;
  to.copy_(from);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  auto written = to;
  return copy_(written, self, non_blocking);
}

at::Scalar local_scalar(const Tensor& self) {
  counts.wait("one number");
  counts.launch("copy to host", self.device().index());
  return on_host(self).item();
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef symbolic, optional<at::MemoryFormat> format) {
  const auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
  if (self.sizes() == size) return self;
  int64_t elements = 1;
  for (auto side : size) elements *= side;
  const size_t bytes = elements ? (elements + self.storage_offset()) * self.element_size() : 0;
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    c10::DeviceGuard guard(self.device());
    auto larger = memory.allocate(bytes);
    if (storage->nbytes()) std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve)
    self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage_and_offset(
    Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  if (strides.empty() && !sizes.empty()) {
    impl->set_sizes_contiguous(sizes);
    impl->set_storage_offset(offset.expect_int());
  } else {
    impl->set_sizes_and_strides(sizes, strides, offset.expect_int());
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const int64_t number = storage.nbytes() / self.element_size();
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(0);
  impl->set_sizes_contiguous({number});
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(other.storage());
  impl->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  return self;
}

Tensor pin_memory(const Tensor& self, optional<Device>) { return self.clone(); }
bool is_pinned(const Tensor&, optional<Device>) { return false; }

// ---- all other operators ----

// One call of an operator: its arguments lie on the stack, and afterwards its results.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), name_(op.schema().name()), stack_(stack),
        first_(stack->size() - op.schema().arguments().size()) {}

  void run() {
    check_devices();
    const auto& overload = schema_.overload_name();
    counts.launch(overload.empty() ? name_ : name_ + "." + overload, device_->index());
    if (waits_always(name_)) counts.wait(name_);
    arguments_to_host();
    if (by_mask_) counts.wait(name_ + " by a mask");
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& [generator, twin] : generators_) generator.set_state(twin.get_state());
    results_to_device();
  }

 private:
  size_t arguments() const { return schema_.arguments().size(); }
  IValue& argument(size_t i) { return (*stack_)[first_ + i]; }
  const c10::AliasInfo* alias(size_t i) const { return schema_.arguments()[i].alias_info(); }

  template <typename F>
  void each_tensor(F&& f) {
    for (size_t i = 0; i < arguments(); i++) {
      auto& value = argument(i);
      if (value.isTensor()) f(value.toTensor());
      else if (value.isTensorList()) for (const Tensor& tensor : value.toTensorVector()) f(tensor);
      else if (value.isList()) for (const IValue& one : value.toListRef()) if (one.isTensor()) f(one.toTensor());
    }
  }

  void refuse(const std::string& other) const {
    TORCH_CHECK(false, name_, ": Expected all tensors to be on the same device, but found at least two devices, ",
        *device_, " and ", other, "!");
  }

  void check_devices() {
    each_tensor([&](const Tensor& tensor) {
      if (!is_cuda(tensor)) return;
      if (!device_) device_ = tensor.device();
      if (*device_ != tensor.device()) refuse(tensor.device().str());
    });
    for (size_t i = 0; i < arguments(); i++)
      if (!device_ && argument(i).isDevice() && argument(i).toDevice().is_cuda()) device_ = argument(i).toDevice();
    TORCH_CHECK(device_, name_, ": no CUDA tensor among its arguments");
    each_tensor([&](const Tensor& tensor) {
      if (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0 && !indexes(name_)) refuse("cpu");
    });
  }

  IValue twin_of(const at::Generator& generator) {
    auto twin = at::detail::createCPUGenerator();
    twin.set_state(generator.get_state());
    generators_.emplace_back(generator, twin);
    return IValue(twin);
  }

  Tensor to_host(size_t i, const Tensor& tensor) {
    by_mask_ = by_mask_ || (i > 0 && indexes(name_) && tensor.defined() && tensor.scalar_type() == at::kBool);
    return seen_by_host(tensor);
  }

  void arguments_to_host() {
    for (size_t i = 0; i < arguments(); i++) {
      auto& value = argument(i);
      originals_.push_back(value);
      if (value.isTensor()) {
        const auto tensor = value.toTensor();
        const bool grows = is_cuda(tensor) && tensor.numel() == 0 && alias(i) && alias(i)->isWrite();
        value = grows ? at::empty(tensor.sizes(), at::TensorOptions().dtype(tensor.scalar_type()).device(c10::kCPU))
                      : to_host(i, tensor);
      } else if (value.isTensorList()) {
        std::vector<Tensor> host;
        for (const Tensor& tensor : value.toTensorVector()) host.push_back(to_host(i, tensor));
        value = IValue(host);
      } else if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
        c10::List<optional<Tensor>> host;
        for (const IValue& one : value.toListRef())
          host.push_back(one.isTensor() ? optional<Tensor>(to_host(i, one.toTensor())) : std::nullopt);
        value = IValue(host);
      } else if (value.isGenerator()) {
        const auto generator = value.toGenerator();
        TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
            generator.device(), "'");
        value = twin_of(generator);
      } else if (value.isNone() && schema_.arguments()[i].name() == "generator") {
        value = twin_of(at::globalContext().defaultGenerator(*device_));
      } else if (value.isDevice() && value.toDevice().is_cuda()) {
        value = IValue(Device(c10::kCPU));
      }
    }
  }

  Tensor to_device(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto dense = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
    auto moved =
        empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), std::nullopt, *device_, std::nullopt);
    on_host(moved).copy_(dense);
    return moved;
  }

  // What was written to is the caller's tensor, which grows where the CPU's kernel made its stand-in larger.
  void restore(IValue& result, const IValue& original) {
    if (result.isTensor() && original.isTensor() && result.toTensor().sizes() != original.toTensor().sizes()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      const auto written = result.toTensor();
      auto grown = original.toTensor();
      grown.resize_(written.sizes());
      if (written.dim() == 4 && !written.is_contiguous() && written.is_contiguous(at::MemoryFormat::ChannelsLast))
        grown.unsafeGetTensorImpl()->empty_tensor_restride(at::MemoryFormat::ChannelsLast);
      on_host(grown).copy_(written);
    }
    result = original;
  }

  void results_to_device() {
    const auto& returns = schema_.returns();
    const auto first = stack_->size() - returns.size();
    for (size_t k = 0; k < returns.size(); k++) {
      auto& result = (*stack_)[first + k];
      const auto* written = returns[k].alias_info();
      if (written && written->isWrite()) {
        for (size_t i = 0; i < originals_.size(); i++)
          if (alias(i) && alias(i)->isWrite() && alias(i)->afterSets() == written->afterSets())
            restore(result, originals_[i]);
      } else if (result.isTensor()) {
        result = to_device(result.toTensor());
      } else if (result.isTensorList()) {
        std::vector<Tensor> moved;
        for (const Tensor& tensor : result.toTensorVector()) moved.push_back(to_device(tensor));
        result = IValue(moved);
      }
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  torch::jit::Stack* stack_;
  size_t first_;
  optional<Device> device_;
  std::vector<IValue> originals_;
  std::vector<std::pair<at::Generator, at::Generator>> generators_;
  bool by_mask_ = false;
};

void by_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using CUDAHooks = Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty_memory_format);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("copy_", &copy_);
  library.impl("_copy_from", &copy_from);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("resize_", &resize_);
  library.impl("_pin_memory", &pin_memory);
  library.impl("is_pinned", &is_pinned);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage_and_offset);
  library.impl("set_.source_Tensor", &set_tensor);
  // Whole, as cuDNN does them: channels-last where the input is.
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
  // One launch for many tensors, in optimisers.
  for (const char* name : {"_foreach_add_.List", "_foreach_add_.Scalar", "_foreach_add.List", "_foreach_mul_.Scalar",
           "_foreach_mul_.List", "_foreach_addcmul_.Scalar", "_foreach_lerp_.Scalar", "_foreach_sqrt_"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

extern "C" {
// Lines of "launch or wait, name, count" and "device, index, 1", separated by tabs; valid until the next call.
const char* pretended_report() {
  static auto& text = *new std::string;
  std::lock_guard<std::mutex> guard(counts.lock);
  text.clear();
  for (const auto& [name, count] : counts.launches) text += "launch\t" + name + "\t" + std::to_string(count) + "\n";
  for (const auto& [name, count] : counts.waits) text += "wait\t" + name + "\t" + std::to_string(count) + "\n";
  for (int device : counts.devices) text += "device\t" + std::to_string(device) + "\t1\n";
  return text.c_str();
}
void pretended_reset() {
  std::lock_guard<std::mutex> guard(counts.lock);
  counts.launches.clear();
  counts.waits.clear();
  counts.devices.clear();
}
int pretended_current() { return current; }
void pretended_set_current(int index) { current = static_cast<DeviceIndex>(index); }
void pretended_allocator() { c10::SetAllocator(CUDA, &memory); }
}
