// An accelerator without hardware: its memory is the host's, its operations are the CPU's.
//
// What code for a GPU can do wrong without one is found with it: tensors of two devices in one
// operation, waiting for numbers of the device (counted), work that cannot be captured in a graph.
// While a graph is captured nothing is computed, and copies from and to the host are refused, as
// CUDA does.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GraphImplInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <vector>

namespace {

using at::Tensor;
using torch::jit::Stack;
constexpr auto KEY = c10::DeviceType::PrivateUse1;

std::atomic<int64_t> reads{0};     // of the device's numbers on the host
std::atomic<int64_t> launches{0};  // of operations, one for each replay of a graph
std::atomic<int64_t> allocated{0}, peak{0}, limit{int64_t(1) << 34};

struct Call {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;
  std::vector<Tensor> results;
};

struct Capture {
  std::vector<Call> calls;
  std::set<const void*> own;  // memory that was allocated while it was captured
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> used;  // memory of others
  bool refused = false;
};
std::atomic<Capture*> capturing{nullptr};

// -- memory ---------------------------------------------------------------------------------------

struct Block { void* data; size_t size; };

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->size;
  std::memset(block->data, 0xFF, block->size);  // who reads it later reads NaN
  std::free(block->data);
  delete block;
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    c10::Device device(KEY, 0);
    if (size == 0) return {nullptr, nullptr, &free_block, device};
    TORCH_CHECK_WITH(OutOfMemoryError, allocated + int64_t(size) <= limit,
                     "sim out of memory: ", size, " bytes on top of ", allocated.load());
    auto* block = new Block{std::malloc(size), size};
    // whoever reads it before it is filled reads NaN; zeros in a capture, for the sake of indices
    std::memset(block->data, capturing.load() ? 0 : 0xFF, size);
    allocated += size;
    peak = std::max(peak.load(), allocated.load());
    if (auto* graph = capturing.load()) graph->own.insert(block->data);
    return {block->data, block, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& bytes = stats.allocated_bytes[0];
    bytes.current = allocated;
    bytes.peak = peak;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = allocated.load(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {limit - allocated, limit};
  }
};

Memory memory;

// -- streams and hooks ----------------------------------------------------------------------------

thread_local c10::StreamId current_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KEY; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {KEY, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    static std::atomic<c10::StreamId> next{1};
    return stream(next++);
  }
  c10::Stream exchangeStream(c10::Stream other) const override {
    auto before = stream(current_stream);
    current_stream = other.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}

 private:
  static c10::Stream stream(c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(KEY, 0), id);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = memory.allocate(size);
    std::memcpy(data.mutable_get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(size);
  }
};

// -- operations -----------------------------------------------------------------------------------

void collect(const c10::IValue& value, std::vector<Tensor>& into) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) into.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& each : value.toListRef()) collect(each, into);
  }
}

std::vector<Tensor> tensors(c10::ArrayRef<c10::IValue> values) {
  std::vector<Tensor> found;
  for (const auto& value : values) collect(value, found);
  return found;
}

// A value with other tensors in it.
template <typename F>
c10::IValue mapped(const c10::IValue& value, F&& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(f(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(f(*t)) : t);
    return list;
  }
  return value;
}

void* bytes(const Tensor& tensor) { return tensor.storage().mutable_data(); }

// A tensor on the same memory, which does not keep it alive; on the host, or on this device.
Tensor borrowed(const Tensor& tensor, c10::DeviceType type) {
  c10::Device device(type, type == KEY ? 0 : -1);
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                              c10::DataPtr(bytes(tensor), device),
                              c10::GetAllocator(type), true);
  auto other = at::empty({0}, tensor.options().device(device));
  other.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  other.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                     tensor.storage_offset());
  return other;
}

Tensor on_host(const Tensor& tensor) {
  return tensor.device().type() == KEY ? borrowed(tensor, c10::kCPU) : tensor;
}

void refuse(const char* what) {
  auto* graph = capturing.load();
  if (graph != nullptr) graph->refused = true;
  TORCH_CHECK(graph == nullptr, "sim: ", what, " is not permitted while a graph is captured");
}

// The CPU has no operations of these two names.
void on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  static const std::string prefix = "aten::convolution_";
  auto of = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  const auto& name = op.schema().name();
  if (name == prefix + "overrideable") return of("aten::convolution").callBoxed(stack);
  if (name == prefix + "backward_overrideable") {
    auto at = stack->end() - op.schema().arguments().size();
    const auto weight = at[2].toTensor();
    const bool transposed = at[6].toBool();
    const auto groups = at[8].toInt();
    c10::List<int64_t> bias{transposed ? weight.size(1) * groups : weight.size(0)};
    stack->insert(at + 3, c10::IValue(bias));
    return of("aten::convolution_backward").callBoxed(stack);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// The CPU's operation, on the same memory.
void run(const c10::OperatorHandle& op, Stack* stack) {
  std::vector<std::pair<Tensor, Tensor>> given;  // here, on the host
  auto host = [&](const Tensor& t) {
    if (!t.defined() || t.device().type() != KEY) {
      TORCH_CHECK(!t.defined() || t.dim() == 0 || t.numel() == 0, "sim: ", op.schema().name(),
                  " was given tensors on different devices");
      return t;
    }
    for (auto& [mine, its] : given) if (mine.is_same(t)) return its;
    given.emplace_back(t, on_host(t));
    return given.back().second;
  };
  auto here = [&](const Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [mine, its] : given) {
      if (!its.is_same(t)) continue;
      if (bytes(its) != bytes(mine)) {  // it was too small for the result
        mine.resize_(its.sizes());
        on_host(mine).copy_(its);
      } else {
        mine.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(),
                                                          t.storage_offset());
      }
      return mine;
    }
    auto made = at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::Device(KEY, 0)));
    on_host(made).copy_(t);
    return made;
  };
  const auto arguments = op.schema().arguments().size();
  for (auto it = stack->end() - arguments; it != stack->end(); ++it)
    *it = it->isDevice() ? c10::IValue(c10::Device(c10::kCPU)) : mapped(*it, host);
  on_cpu(op, stack);
  const auto returned = op.schema().returns().size();
  for (auto it = stack->end() - returned; it != stack->end(); ++it) *it = mapped(*it, here);
}

// What a graph keeps of an argument: of memory that is not its own, only the place.
Tensor kept(const Tensor& t, Capture& graph) {
  if (!t.defined()) return t;
  if (t.device().type() != KEY) return t.detach().clone();  // a number, as it is now
  if (graph.own.count(bytes(t))) return t.detach();
  if (t.storage().nbytes() != 0) graph.used.push_back(t.storage().getWeakStorageImpl());
  return borrowed(t.detach(), KEY);
}

void capture(const c10::OperatorHandle& op, Stack* stack, Capture& graph) {
  const auto count = op.schema().arguments().size();
  std::vector<c10::IValue> arguments;
  for (auto it = stack->end() - count; it != stack->end(); ++it)
    arguments.push_back(mapped(*it, [&](const Tensor& t) { return kept(t, graph); }));
  std::vector<std::pair<Tensor, std::vector<char>>> before;  // nothing is computed in a capture
  for (const Tensor& t : tensors(arguments)) {
    if (t.device().type() != KEY) continue;  // a number: `run` refuses others
    auto* from = static_cast<char*>(bytes(t));
    before.emplace_back(t, std::vector<char>(from, from + t.storage().nbytes()));
  }
  for (auto& [t, _] : before)  // there may be no numbers yet, and indices have to be some
    if (t.scalar_type() == at::kLong) std::memset(bytes(t), 0, t.storage().nbytes());
  run(op, stack);
  const auto returned = op.schema().returns().size();
  auto results = tensors(c10::ArrayRef<c10::IValue>(*stack).slice(stack->size() - returned));
  for (auto& [t, was] : before) std::memcpy(bytes(t), was.data(), was.size());
  for (Tensor& t : results) t = graph.own.count(bytes(t)) ? t.detach() : borrowed(t.detach(), KEY);
  graph.calls.push_back(Call{op, std::move(arguments), std::move(results)});
}

// Whether CUDA's kernel asks the device how many places there are.
bool waits(const c10::OperatorHandle& op, const Stack& stack) {
  static const std::set<std::string> always{"aten::nonzero", "aten::masked_select", "aten::_unique2"};
  const auto& name = op.schema().name();
  if (always.count(name)) return true;
  if (name.rfind("aten::index", 0) != 0 && name.rfind("aten::_index_put", 0) != 0) return false;
  const auto& second = *(stack.end() - op.schema().arguments().size() + 1);
  const auto places = second.isList() ? tensors(second) : std::vector<Tensor>{};
  return std::any_of(places.begin(), places.end(),
                     [](const Tensor& t) { return t.scalar_type() == at::kBool; });
}

void operation(const c10::OperatorHandle& op, Stack* stack) {
  ++launches;
  if (waits(op, *stack)) {
    refuse("an operation that waits");
    ++reads;
  }
  auto* graph = capturing.load();
  if (graph == nullptr) run(op, stack);
  else capture(op, stack, *graph);
}

// At the first convolution of these shapes in a thread, cuDNN may time its kernels.
void convolution(const c10::OperatorHandle& op, Stack* stack) {
  thread_local std::set<std::string> known;
  std::ostringstream shapes;
  shapes << op.schema().name();
  for (const Tensor& t : tensors(c10::ArrayRef<c10::IValue>(*stack))) shapes << t.sizes();
  if (known.insert(shapes.str()).second) refuse("looking for the fastest kernel");
  operation(op, stack);
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const bool here = from.device().type() == KEY, there = to.device().type() == KEY;
  if (here != there) refuse("a copy from or to the host");
  if (here && !there) ++reads;
  if (here && there) ++launches;
  if (auto* graph = capturing.load()) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_copy_from", "");
    graph->calls.push_back(Call{op, {kept(from, *graph), kept(to, *graph), false}, {}});
    return to;
  }
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return to.copy_(from);
}

at::Scalar local_scalar_dense(const Tensor& tensor) {
  refuse("reading a number");
  ++reads;
  return at::_local_scalar_dense(on_host(tensor));
}

Tensor& set_storage(Tensor& self, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage storage) {
  const auto count = int64_t(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, c10::SymIntArrayRef({c10::SymInt(count)}),
                     c10::SymIntArrayRef({c10::SymInt(1)}));
}

const Tensor& resize(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t needed = (self.storage_offset() + self.numel()) * self.itemsize();
  if (self.storage().nbytes() < needed)
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  return self;
}

// -- graphs ---------------------------------------------------------------------------------------

struct Graph final : at::GraphImplInterface {
  explicit Graph(const at::GraphImplArgs&) {}
  ~Graph() override { reset(); }
  void capture_begin(at::MempoolId_t pool, at::GraphCaptureMode) override {
    TORCH_CHECK(current_stream != 0, "sim: graphs are captured on a stream of their own");
    TORCH_CHECK(capturing == nullptr, "sim: another graph is captured");
    reset();
    const bool shared = pool.first || pool.second;
    TORCH_CHECK(!shared || users[pool.first] > 0, "sim: all graphs of this pool are gone");
    pool_ = shared ? pool : at::MempoolId_t{++pools, 0};
    ++users[pool_.first];
    capturing = &capture_;
  }
  void capture_end() override {
    capturing = nullptr;
    TORCH_CHECK(!capture_.refused, "sim: something was refused in this capture");
    ended_ = true;  // its pool is kept for good where it did not end, as by torch 2.13
  }
  void instantiate() override {}
  void replay() override {
    ++launches;
    for (auto& storage : capture_.used)
      TORCH_CHECK(!storage.expired(), "sim: a graph uses memory that was freed");
    for (const Call& call : capture_.calls) spoil(call);
    for (const Call& call : capture_.calls) {
      Stack stack(call.arguments.begin(), call.arguments.end());
      if (call.results.empty()) {
        call.op.callBoxed(&stack);
        --launches;
        continue;
      }
      run(call.op, &stack);
      auto results = tensors(stack);
      for (size_t i = 0; i < results.size(); ++i) {
        if (bytes(results[i]) == bytes(call.results[i])) continue;
        TORCH_CHECK(results[i].sizes() == call.results[i].sizes(), "sim: another size");
        on_host(call.results[i]).copy_(on_host(results[i]));
      }
    }
  }
  void reset() override {
    if (ended_) --users[pool_.first];
    ended_ = false;
    capture_ = {};
  }
  at::MempoolId_t pool() const override { return pool_; }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override {}

 private:
  // Other graphs may have used its memory meanwhile.
  void spoil(const Call& call) const {
    for (const Tensor& t : tensors(call.arguments)) spoil(t);
    for (const Tensor& t : call.results) spoil(t);
  }
  void spoil(const Tensor& t) const {
    if (capture_.own.count(bytes(t))) std::memset(bytes(t), 0xFF, t.storage().nbytes());
  }

  inline static std::atomic<uint64_t> pools{0};
  inline static std::map<uint64_t, int> users;  // graphs of a pool
  at::MempoolId_t pool_{0, 0};
  bool ended_ = false;
  Capture capture_;
};

}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(GraphImplRegistry, "PRIVATEUSEONE", Graph)
C10_REGISTER_TYPED_CLASS(GraphImplRegistry, "SIM", Graph)
}

namespace at::autocast {
#define LOWER(OP) KERNEL_PRIVATEUSEONE(OP, lower_precision_fp)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  LOWER(linear) LOWER(matmul) LOWER(mm) LOWER(bmm) LOWER(addmm) LOWER(baddbmm) LOWER(conv2d)
}
}  // namespace at::autocast

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&operation>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  for (auto name : {"convolution_overrideable", "convolution_backward_overrideable"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("resize_", resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
}

TORCH_LIBRARY(sim, m) {
  m.def("start() -> ()", [] {
    c10::SetAllocator(KEY, &memory);
    at::RegisterPrivateUse1HooksInterface(new Hooks());
  });
  m.def("reads() -> int", [] { return reads.load(); });
  m.def("launches() -> int", [] { return launches.load(); });
  m.def("limit(int bytes) -> ()", [](int64_t value) { limit = value; });
}
