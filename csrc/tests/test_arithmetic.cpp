// Numbers, transforms and vectors against double precision.

#include "../fbank/simd.h"
#include "reference.h"

namespace {

using cat::Complex;

std::mt19937 random_numbers(0);

reference::Spectrum noise(size_t n) {
  std::normal_distribution<double> normal;
  reference::Spectrum x(n);
  for (auto& value : x) value = {double(float(normal(random_numbers))), double(float(normal(random_numbers)))};
  return x;
}

template <class T>
void check_spectrum(const T& found, const reference::Spectrum& expected, const std::string& name) {
  double norm = 0;
  for (const auto& value : expected) norm += std::norm(value);
  const double bound = 4 * reference::kEps * std::sqrt(norm);
  for (size_t k = 0; k < expected.size(); ++k) {
    const std::complex<double> value(double(found[k].re), double(found[k].im));
    CHECK(std::abs(value - expected[k]) <= bound) << name << ", frequency " << k;
  }
}

std::vector<Complex<float>> to_float(const reference::Spectrum& x) {
  std::vector<Complex<float>> values;
  for (const auto& value : x) values.push_back({float(value.real()), float(value.imag())});
  return values;
}

void check_reference() {
  for (size_t n : {1, 2, 8, 64}) {
    const reference::Spectrum x = noise(n), X = reference::fft(x), expected = reference::dft(x);
    for (size_t k = 0; k < n; ++k) CHECK(std::abs(X[k] - expected[k]) < 1e-12) << n << " points, frequency " << k;
  }
}

template <int kFilled>
void check_dft16() {
  reference::Spectrum x = noise(16);
  for (size_t i = kFilled; i < 16; ++i) x[i] = 0;
  Complex<float> z[16];
  for (size_t i = 0; i < 16; ++i) z[i] = i < kFilled ? to_float(x)[i] : Complex<float>{0, 0};
  cat::dft16<kFilled>(z);
  std::vector<Complex<float>> in_order;
  for (int k = 0; k < 16; ++k) in_order.push_back(z[cat::place16(k)]);
  check_spectrum(in_order, reference::dft(x), "dft16 of " + std::to_string(kFilled));
}

void check_stockham(int points) {
  const reference::Spectrum x = noise(size_t(points));
  std::vector<Complex<float>> z = to_float(x), other(z.size()), twiddle;
  for (int k = 0; k < points; ++k) {
    twiddle.push_back({float(std::cos(2 * reference::kPi * k / points)), float(-std::sin(2 * reference::kPi * k / points))});
  }
  int stride = 1;
  for (; 4 * stride <= points; stride *= 4, std::swap(z, other)) {
    for (int j = 0; j < points / 4; ++j) cat::stockham4(z.data(), other.data(), twiddle.data(), points, stride, j);
  }
  if (stride < points) {
    for (int j = 0; j < points / 2; ++j) cat::stockham2(z.data(), other.data(), points, j);
    std::swap(z, other);
  }
  check_spectrum(z, points <= 256 ? reference::dft(x) : reference::fft(x), std::to_string(points) + " points");
}

void check_split(int n) {
  reference::Spectrum x = noise(size_t(2 * n)), z(static_cast<size_t>(n));
  for (auto& value : x) value = value.real();
  for (size_t k = 0; k < size_t(n); ++k) z[k] = {x[2 * k].real(), x[2 * k + 1].real()};
  const std::vector<Complex<float>> Z = to_float(reference::fft(z));
  const reference::Spectrum X = reference::dft(x);
  for (int k = 0; k <= n / 2; ++k) {
    float low, high;
    const double angle = reference::kPi * k / n;
    cat::split(Z[size_t(k)], Z[size_t(k ? n - k : 0)], {float(std::cos(angle)), float(-std::sin(angle))}, low, high);
    const double expected_low = 4 * std::norm(X[size_t(k)]), expected_high = 4 * std::norm(X[size_t(n - k)]);
    CHECK(std::fabs(low - expected_low) <= 1e-5 * (expected_low + 1)) << n << ": bin " << k;
    CHECK(std::fabs(high - expected_high) <= 1e-5 * (expected_high + 1)) << n << ": bin " << n - k;
  }
}

// All halves there and back, and numbers in between to the nearest of them.
void check_halves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const cat::Half half{uint16_t(bits)};
    const cat::BFloat16 brain{uint16_t(bits)};
    const float value = cat::to_float(half), other = cat::to_float(brain);
    cat::Half half_again;
    cat::BFloat16 brain_again;
    cat::assign(half_again, value);
    cat::assign(brain_again, other);
    CHECK(value != value ? (half_again.bits & 0x7fff) > 0x7c00 : half_again.bits == bits) << "float16 " << bits;
    CHECK(other != other ? (brain_again.bits & 0x7fff) > 0x7f80 : brain_again.bits == bits) << "bfloat16 " << bits;
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, int(exponent) - 25) : std::ldexp(mantissa, -24);
    CHECK(exponent == 31 || value == (bits & 0x8000 ? -magnitude : magnitude)) << "float16 " << bits;
    if ((bits & 0x7fff) < 0x7bff) {  // and a neighbour that is finite
      const float next = cat::to_float(cat::Half{uint16_t(bits + 1)}), middle = value + (next - value) / 2;
      cat::Half rounded;
      cat::assign(rounded, middle);
      CHECK(rounded.bits == (bits & 1 ? bits + 1 : bits)) << "float16 tie above " << bits;
      cat::assign(rounded, std::nextafter(middle, next));
      CHECK(rounded.bits == bits + 1) << "float16 above the tie above " << bits;
    }
    if ((bits & 0x7fff) < 0x7f7f) {
      cat::BFloat16 rounded;
      cat::assign(rounded, cat::as_float(bits << 16 | 0x8000));
      CHECK(rounded.bits == (bits & 1 ? bits + 1 : bits)) << "bfloat16 tie above " << bits;
      cat::assign(rounded, cat::as_float(bits << 16 | 0x8001));
      CHECK(rounded.bits == bits + 1) << "bfloat16 above the tie above " << bits;
    }
  }
  cat::Half half;
  cat::assign(half, 65519.996f);
  CHECK(half.bits == 0x7bff) << "the largest float16";
  cat::assign(half, 65520.0f);
  CHECK(half.bits == 0x7c00) << "float16 infinity";
}

void check_vectors() {
  constexpr int W = cat::kWidth;
  cat::Vector rows[W];
  for (int r = 0; r < W; ++r) {
    for (int c = 0; c < W; ++c) rows[r][c] = float(100 * r + c);
  }
  cat::transpose(rows);
  for (int r = 0; r < W; ++r) {
    for (int c = 0; c < W; ++c) CHECK(rows[r][c] == float(100 * c + r)) << "transpose " << r << ", " << c;
  }
}

void check_log() {
  std::uniform_real_distribution<double> exponent(-125, 127.9);
  std::vector<float> values = {1.0f, 1.1754944e-38f, 3.4028235e38f, cat::kEnergyFloor, 0.70710677f, 0.70710683f, 1.4142135f};
  for (int i = 0; i < 100000; ++i) values.push_back(float(std::exp2(exponent(random_numbers))));
  for (int i = -1000; i < 1000; ++i) values.push_back(1 + float(i) * 0x1p-23f);
  for (float value : values) {
    const double expected = std::log(double(value)), found = double(cat::log(cat::broadcast(value))[0]);
    CHECK(std::fabs(found - expected) <= 2e-7 * std::fabs(expected) + 1e-10) << "log " << value << " = " << found;
  }
  CHECK(std::isnan(cat::log_energy(cat::broadcast(std::nanf("")))[0])) << "NaN";
  CHECK(std::isinf(cat::log_energy(cat::broadcast(INFINITY))[0])) << "infinity";
  CHECK(cat::log_energy(cat::broadcast(0))[0] == -15.942385f) << "the floor";
}

}  // namespace

int main() {
  check_reference();
  check_dft16<13>();
  check_dft16<14>();
  check_dft16<15>();
  check_dft16<16>();
  for (int points = 1; points <= 4096; points *= 2) check_stockham(points);
  for (int n = 1; n <= 256; n *= 2) check_split(n);
  check_halves();
  check_vectors();
  check_log();
  return check::result("test_arithmetic");
}
