// Copies between stored slices, [K, V][kv head][token][dim] of a block's own tokens, and pages of any strides;
// and the rotation of keys. Compiled by page_kernels.py, which checks all sizes and alignments before a launch.
// No header is included: NVRTC has none of its own, and conversions are done in integers as on the host.

typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct Piece {  // geometry.PIECE
    i64 slice;  // Byte offset of the block's slice in the staging.
    int block_tokens, token_of_block, tokens, page, token_of_page, first_token;
};

struct Side {  // Keys or values of one layer.
    i64 pages;  // Address.
    i64 page_stride, head_stride, token_stride, dim_stride;  // In bytes.
    i64 dim;    // Elements.
    i64 width;  // Bytes of one access. With dims that are not contiguous, the size of an element.
};

struct Layer {
    Side keys, values;
    i64 heads, item_bytes;
};

struct Stretch {
    i64 first, end;  // Tokens.
    i64 row;         // Of its first token, in the tables.
    i64 row_step;    // 0: all its tokens have one row.
};

struct Rotation {
    i64 stretches, cos, sin;  // Addresses. Tables are [row][half], fp32.
    i64 count, half;
    i64 type;         // 0: float32, 1: float16, 2: bfloat16.
    i64 interleaved;  // Pairs are dims 2 i and 2 i + 1; otherwise i and i + half.
    i64 in_fp32;      // Otherwise products are rounded to the type.
    i64 width;        // Bytes of one access: 16, or the size of an element.
};

struct Strided {  // An array [outer, inner, token, dim] that is rotated in place.
    i64 address, outer, inner, tokens, dim;
    i64 outer_stride, inner_stride, token_stride, dim_stride;
};

struct Fence {  // Where its word has another value, pieces are no longer copied.
    i64 address;  // 0: no fence.
    i64 value;
};

struct Table {  // One token's numbers. Without them the token is not rotated.
    const float *cos, *sin;
};

// ---- elements ----------------------------------------------------------------------------------------------------

struct Float32 {
    typedef u32 Bits;
    static __device__ float load(u32 bits) { return __uint_as_float(bits); }
    static __device__ u32 store(float value) { return __float_as_uint(value); }
};

struct Float16 {
    typedef u16 Bits;
    static __device__ float load(u16 bits) {
        u32 sign = (u32)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
        if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
        if (exponent != 0u) return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
        float subnormal = (float)fraction * 5.9604644775390625e-8f;  // 2^-24; exact.
        return __uint_as_float(sign | __float_as_uint(subnormal));
    }
    static __device__ u16 store(float value) {  // To nearest, ties to even; too large is infinity.
        u32 bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
        if (size > 0x7f800000u) return (u16)(sign | 0x7e00u | (size >> 13 & 0x3ffu));
        if (size >= 0x477ff000u) return (u16)(sign | 0x7c00u);
        if (size < 0x38800000u)  // The unit in the last place of 0.5 is that of the subnormals.
            return (u16)(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u));
        return (u16)(sign | (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13);
    }
};

struct BFloat16 {
    typedef u16 Bits;
    static __device__ float load(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static __device__ u16 store(float value) {  // To nearest, ties to even.
        u32 bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
        return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
};

// CuPy compiles with -ftz=true, which cannot be undone by an option: __fmul_rn would flush subnormal numbers to zero.
#ifdef CUDASIM  // g++ stands in for NVRTC there: it knows no PTX. It neither flushes nor fuses.
__device__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ float difference(float a, float b) { return __fsub_rn(a, b); }
#else
__device__ float product(float a, float b) {
    float result;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));  // Never fused with a sum.
    return result;
}
__device__ float sum(float a, float b) {
    float result;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
__device__ float difference(float a, float b) {
    float result;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
#endif

template <class E>
__device__ float rounded(float value, bool in_fp32) {
    return in_fp32 ? value : E::load(E::store(value));
}

// (a, b) -> (a cos - b sin, b cos + a sin)
template <class E>
__device__ void turn(typename E::Bits& first, typename E::Bits& second, float cos, float sin, bool in_fp32) {
    float a = E::load(first), b = E::load(second);
    float a_cos = rounded<E>(product(a, cos), in_fp32), b_sin = rounded<E>(product(b, sin), in_fp32);
    float b_cos = rounded<E>(product(b, cos), in_fp32), a_sin = rounded<E>(product(a, sin), in_fp32);
    first = E::store(difference(a_cos, b_sin));
    second = E::store(sum(b_cos, a_sin));
}

// ---- one unit of a row --------------------------------------------------------------------------------------------

template <class T>
__device__ void move(const u8* from, u8* to) {
    *(T*)to = *(const T*)from;
}

__device__ void move_unit(const u8* from, u8* to, i64 width) {
    switch (width) {
        case 16: return move<uint4>(from, to);
        case 8: return move<uint2>(from, to);
        case 4: return move<u32>(from, to);
        case 2: return move<u16>(from, to);
        default: return move<u8>(from, to);
    }
}

template <class E>
union Vector {
    uint4 whole;
    typename E::Bits elements[16 / sizeof(typename E::Bits)];
};

// The pairs of one unit, of a row whose elements are `from_step` and `to_step` bytes apart (vectors: side by side).
template <class E>
__device__ void turn_unit(const u8* from, i64 from_step, u8* to, i64 to_step, u32 unit, const Rotation& rotation,
                          Table table) {
    typedef typename E::Bits Bits;
    const int lanes = 16 / sizeof(Bits);
    bool in_fp32 = rotation.in_fp32 != 0;
    if (rotation.width != 16) {
        i64 a = rotation.interleaved ? 2 * (i64)unit : unit, b = rotation.interleaved ? a + 1 : a + rotation.half;
        Bits first = *(const Bits*)(from + a * from_step), second = *(const Bits*)(from + b * from_step);
        if (table.cos) turn<E>(first, second, table.cos[unit], table.sin[unit], in_fp32);
        *(Bits*)(to + a * to_step) = first;
        *(Bits*)(to + b * to_step) = second;
    } else if (rotation.interleaved) {
        Vector<E> pairs;
        pairs.whole = *(const uint4*)(from + 16 * (i64)unit);
        if (table.cos)
#pragma unroll  // Vectors stay in registers.
            for (int i = 0; i < lanes / 2; i++)
                turn<E>(pairs.elements[2 * i], pairs.elements[2 * i + 1], table.cos[unit * (lanes / 2) + i],
                        table.sin[unit * (lanes / 2) + i], in_fp32);
        *(uint4*)(to + 16 * (i64)unit) = pairs.whole;
    } else {
        i64 other = rotation.half * (i64)sizeof(Bits);
        Vector<E> first, second;
        first.whole = *(const uint4*)(from + 16 * (i64)unit);
        second.whole = *(const uint4*)(from + other + 16 * (i64)unit);
        if (table.cos)
#pragma unroll  // Vectors stay in registers.
            for (int i = 0; i < lanes; i++)
                turn<E>(first.elements[i], second.elements[i], table.cos[unit * lanes + i],
                        table.sin[unit * lanes + i], in_fp32);
        *(uint4*)(to + 16 * (i64)unit) = first.whole;
        *(uint4*)(to + other + 16 * (i64)unit) = second.whole;
    }
}

__device__ void turn_any(const u8* from, i64 from_step, u8* to, i64 to_step, u32 unit, const Rotation& rotation,
                         Table table) {
    switch (rotation.type) {
        case 0: return turn_unit<Float32>(from, from_step, to, to_step, unit, rotation, table);
        case 1: return turn_unit<Float16>(from, from_step, to, to_step, unit, rotation, table);
        default: return turn_unit<BFloat16>(from, from_step, to, to_step, unit, rotation, table);
    }
}

__device__ u32 pair_units(const Rotation& rotation) {
    if (rotation.width != 16) return (u32)rotation.half;
    return (u32)(rotation.half * (rotation.type ? 2 : 4) * (rotation.interleaved ? 2 : 1) / 16);
}

__device__ Table table_of(const Rotation& rotation, i64 token) {
    const Stretch* stretches = (const Stretch*)rotation.stretches;
    i64 low = 0, high = rotation.count;  // The stretch that ends first after the token.
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (stretches[middle].end <= token) low = middle + 1;
        else high = middle;
    }
    Table table = {0, 0};
    if (low == rotation.count || token < stretches[low].first) return table;
    i64 row = stretches[low].row + stretches[low].row_step * (token - stretches[low].first);
    table.cos = (const float*)rotation.cos + row * rotation.half;
    table.sin = (const float*)rotation.sin + row * rotation.half;
    return table;
}

// ---- pieces -------------------------------------------------------------------------------------------------------

// The keys or the values of one piece. Of each row, `turned` units are pairs of a key; the rest is copied from
// element `first` on. `stored` is where the slice has this side.
template <bool TO_PAGES, bool ROTATED>
__device__ void copy_side(const Side& side, i64 item, u32 heads, u8* stored, const Piece& piece, u32 turned, i64 first,
                          const Rotation& rotation) {
    u32 tokens = (u32)piece.tokens, units = turned + (u32)((side.dim - first) * item / side.width);
    u32 all = heads * tokens * units;
    i64 unit_elements = side.width / item, row_bytes = side.dim * item;
    u8* page = (u8*)side.pages + piece.page * side.page_stride + piece.token_of_page * side.token_stride;
    stored += piece.token_of_block * row_bytes;
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < all; at += gridDim.x * blockDim.x) {
        u32 unit = at % units, row = at / units, token = row % tokens, head = row / tokens;
        u8* in_page = page + head * side.head_stride + token * side.token_stride;
        u8* in_slice = stored + ((i64)head * piece.block_tokens + token) * row_bytes;
        if (ROTATED && unit < turned) {
            Table table = table_of(rotation, (i64)piece.first_token + token);
            turn_any(in_slice, item, in_page, side.dim_stride, unit, rotation, table);
            continue;
        }
        i64 element = first + (i64)(unit - turned) * unit_elements;
        in_page += element * side.dim_stride;
        in_slice += element * item;
        if (TO_PAGES) move_unit(in_slice, in_page, side.width);
        else move_unit(in_page, in_slice, side.width);
    }
}

template <bool TO_PAGES, bool ROTATED>
__device__ void copy_pieces(u8* staging, const Piece* pieces, i64 count, const Layer& layer, const Rotation& rotation,
                            Fence fence) {
    u32 turned = ROTATED ? pair_units(rotation) : 0;
    i64 first = ROTATED ? 2 * rotation.half : 0;
    for (i64 number = blockIdx.y; number < count; number += gridDim.y) {
        if (fence.address && *(const volatile u32*)fence.address != (u32)fence.value) return;
        Piece piece = pieces[number];
        u8* keys = staging + piece.slice;
        u8* values = keys + layer.heads * piece.block_tokens * layer.keys.dim * layer.item_bytes;
        u32 heads = (u32)layer.heads;
        copy_side<TO_PAGES, ROTATED>(layer.keys, layer.item_bytes, heads, keys, piece, turned, first, rotation);
        if (layer.values.dim)
            copy_side<TO_PAGES, false>(layer.values, layer.item_bytes, heads, values, piece, 0, 0, rotation);
    }
}

// ---- kernels ------------------------------------------------------------------------------------------------------

extern "C" __global__ void scatter(u8* staging, const Piece* pieces, i64 count, Fence fence, Layer layer) {
    copy_pieces<true, false>(staging, pieces, count, layer, Rotation(), fence);
}

extern "C" __global__ void scatter_rotated(u8* staging, const Piece* pieces, i64 count, Fence fence, Layer layer,
                                           Rotation rotation) {
    copy_pieces<true, true>(staging, pieces, count, layer, rotation, fence);
}

extern "C" __global__ void gather(u8* staging, const Piece* pieces, i64 count, Layer layer) {
    copy_pieces<false, false>(staging, pieces, count, layer, Rotation(), Fence());
}

extern "C" __global__ void rotate(Strided keys, Rotation rotation) {
    u32 units = pair_units(rotation), all = (u32)(keys.inner * keys.tokens) * units;
    for (i64 outer = blockIdx.y; outer < keys.outer; outer += gridDim.y)
        for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < all; at += gridDim.x * blockDim.x) {
            u32 unit = at % units, row = at / units, token = row % (u32)keys.tokens, inner = row / (u32)keys.tokens;
            Table table = table_of(rotation, token);
            if (!table.cos) continue;
            u8* place = (u8*)keys.address + outer * keys.outer_stride + inner * keys.inner_stride +
                        token * keys.token_stride;
            turn_any(place, keys.dim_stride, place, keys.dim_stride, unit, rotation, table);
        }
}
