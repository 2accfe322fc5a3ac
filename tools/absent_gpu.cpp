// Lets torch work with tensors that say they are on a CUDA device where there is none.
//
// Autograd asks a device for its streams and events, and `pin_memory` for an allocator: here one
// device, which has nothing to wait for. Attention asks a device which kernel it has; the answer is
// set from Python with `choose_attention` (torch.nn.attention.SDPBackend; 0 is plain arithmetic).
//
// Loaded before libtorch looks for CUDA: see tools/absent_gpu.py. A torch that was built for CUDA
// has hooks of a lower priority; the other two it sets when it is loaded, so `take_over` is called
// after that.

#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

namespace {

using namespace c10;

const Device only(DeviceType::CUDA, 0);
const Stream its_stream(Stream::DEFAULT, only);

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return only; }
  Device exchangeDevice(Device) const override { return only; }
  Stream getStream(Device) const noexcept override { return its_stream; }
  Stream getDefaultStream(Device) const override { return its_stream; }
  Stream exchangeStream(Stream) const noexcept override { return its_stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

const Guard guard;

}  // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
};

C10_REGISTER_CLASS_WITH_PRIORITY(
    CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)

class Tensor;

namespace native {

// As in ATen/native/transformers/attention.h, which takes seconds to compile
using Choose = int64_t (*)(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool);
DECLARE_DISPATCH(Choose, _fused_sdp_choice_stub)

int64_t chosen = 0;

template <typename... Arguments>
int64_t choose(Arguments...) {
  return chosen;
}

}  // namespace native
}  // namespace at

extern "C" {

void take_over() {
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&at::native::choose);
}

void choose_attention(int64_t backend) { at::native::chosen = backend; }

}
