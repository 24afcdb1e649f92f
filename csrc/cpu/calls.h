// The structs that Python calls C++ with: one for each op, with its arguments, results and sizes.
//
// Written by `python -m itm_fast.ops._calls` from the declarations in itm_fast/ops; do not change it by hand.
#pragma once
#include <cstdint>

namespace itm_fast {

constexpr char CALLS[] = "b395caa3c9ae59c7";  // what the structs are compared by at the first call

enum class Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum class Direction : int64_t { T2I, I2T, BOTH };
enum class Norm : int64_t { SOFTMAX, L2NORM, CLIPPED_L2NORM, L1NORM, CLIPPED_L1NORM, CLIPPED, NONE, COSINE };
enum class Pool : int64_t { LSE, MAX, SUM, MEAN };

struct CrossAttentionScoreCall {
  const void* image;              // [I, R, D]
  const void* words;              // [N, D]
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* region_lengths;  // [I], or null
  Direction direction;
  Norm affinity_norm;
  double scale;
  Pool pool;
  double pool_scale;
  void* score;                    // [I, T]
  const void* grad;               // of score
  void* d_image;                  // or null
  void* d_words;                  // or null
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t R;
  int64_t T;
  int64_t N;
  int64_t D;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(CrossAttentionScoreCall) == 8 * 21);

struct CrossAttentionSimilarityCall {
  const void* image;              // [I, R, D]
  const void* words;              // [N, D]
  const void* weight;             // [S, D]
  const void* bias;               // [S]
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* region_lengths;  // [I], or null
  Direction direction;
  Norm affinity_norm;
  double scale;
  void* similarity;
  const void* grad;               // of similarity
  void* d_image;                  // or null
  void* d_words;                  // or null
  void* d_weight;                 // or null
  void* d_bias;                   // or null
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t R;
  int64_t T;
  int64_t N;
  int64_t D;
  int64_t S;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(CrossAttentionSimilarityCall) == 8 * 24);

struct HierarchicalAlignmentScoreCall {
  const void* image;              // [I, R, D]
  const void* image_key;          // [I, R, P]
  const void* image_gate;         // [I, R, 2, K]
  const void* words;              // [N, D]
  const void* word_key;           // [N, P]
  const void* word_gate;          // [N, 2, K]
  const void* image_pool;         // [D]
  const void* caption_pool;       // [D]
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* region_lengths;  // [I], or null
  Direction direction;
  double scale;
  Pool pool;
  double local_mix;
  double global_mix;
  void* score;                    // [I, T]
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t R;
  int64_t T;
  int64_t N;
  int64_t D;
  int64_t P;
  int64_t K;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(HierarchicalAlignmentScoreCall) == 8 * 26);

struct LinearCall {
  const void* x;                  // [N, K]
  const void* weight;             // [S, K]
  const void* bias;               // [S]
  void* product;                  // [N, S]
  Dtype dtype;                    // of all tensors of floats
  int64_t N;
  int64_t S;
  int64_t K;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(LinearCall) == 8 * 10);

struct SimilarityContextCall {
  const void* overall;            // [I, T, S]
  const void* local;              // [I, N, S]
  const void* assignment;         // [C, S]
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* sizes;
  void* nodes;                    // [I, N+T+T*C, S]
  const void* grad;               // of nodes
  void* d_overall;                // or null
  void* d_local;                  // or null
  void* d_assignment;             // or null
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t T;
  int64_t N;
  int64_t S;
  int64_t C;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(SimilarityContextCall) == 8 * 18);

struct SimilarityFilterCall {
  const void* nodes;              // [I, M, S]
  const void* weight;             // [S]
  const void* bias;               // [1]
  const void* norm_weight;        // [1]
  const void* norm_bias;          // [1]
  const void* running_mean;       // [1], double
  const void* running_var;        // [1], double
  const int64_t* cu_seqlens;      // [T+1]
  int64_t training;               // 0 or 1
  double eps;
  void* z;                        // [I, T, S]
  void* mean;
  void* var;
  const void* grad;               // of z
  void* d_nodes;                  // or null
  void* d_weight;                 // or null
  void* d_bias;                   // or null
  void* d_norm_weight;            // or null
  void* d_norm_bias;              // or null
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t T;
  int64_t M;
  int64_t S;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(SimilarityFilterCall) == 8 * 26);

struct SimilarityFilterScoreCall {
  const void* image;              // [I, R, D]
  const void* image_global;       // [I, D]
  const void* words;              // [N, D]
  const void* caption_global;     // [T, D]
  const void* local_weight;       // [S, D]
  const void* local_bias;         // [S]
  const void* global_weight;      // [S, D]
  const void* global_bias;        // [S]
  const void* filter_weight;      // [S]
  const void* filter_bias;        // [1]
  const void* norm_weight;        // [1]
  const void* norm_bias;          // [1]
  const void* score_weight;       // [S]
  const void* score_bias;         // [1]
  const void* running_mean;       // [1], double
  const void* running_var;        // [1], double
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* region_lengths;  // [I], or null
  double scale;
  double eps;
  void* score;                    // [I, T]
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t R;
  int64_t T;
  int64_t N;
  int64_t D;
  int64_t S;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(SimilarityFilterScoreCall) == 8 * 30);

struct SimilarityGraphCall {
  const void* nodes;              // [I, M, S]
  const void* query_weight;       // [K, S, S]
  const void* query_bias;         // [K, S]
  const void* key_weight;         // [K, S, S]
  const void* key_bias;           // [K, S]
  const void* value_weight;       // [K, S, S]
  const void* value_bias;         // [K, S]
  const int64_t* cu_seqlens;      // [T+1]
  void* z;                        // [I, T, S]
  const void* grad;               // of z
  void* d_nodes;                  // or null
  void* d_query_weight;           // or null
  void* d_query_bias;             // or null
  void* d_key_weight;             // or null
  void* d_key_bias;               // or null
  void* d_value_weight;           // or null
  void* d_value_bias;             // or null
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t T;
  int64_t M;
  int64_t S;
  int64_t K;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(SimilarityGraphCall) == 8 * 25);

struct SimilarityGraphScoreCall {
  const void* image;              // [I, R, D]
  const void* image_global;       // [I, D]
  const void* words;              // [N, D]
  const void* caption_global;     // [T, D]
  const void* local_weight;       // [S, D]
  const void* local_bias;         // [S]
  const void* global_weight;      // [S, D]
  const void* global_bias;        // [S]
  const void* query_weight;       // [K, S, S]
  const void* query_bias;         // [K, S]
  const void* key_weight;         // [K, S, S]
  const void* key_bias;           // [K, S]
  const void* value_weight;       // [K, S, S]
  const void* value_bias;         // [K, S]
  const void* score_weight;       // [S]
  const void* score_bias;         // [1]
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* region_lengths;  // [I], or null
  double scale;
  void* score;                    // [I, T]
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t R;
  int64_t T;
  int64_t N;
  int64_t D;
  int64_t S;
  int64_t K;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(SimilarityGraphScoreCall) == 8 * 30);

struct SimilarityNodesCall {
  const void* image;              // [I, R, D]
  const void* image_global;       // [I, D]
  const void* words;              // [N, D]
  const void* caption_global;     // [T, D]
  const void* local_weight;       // [S, D]
  const void* local_bias;         // [S]
  const void* global_weight;      // [S, D]
  const void* global_bias;        // [S]
  const int64_t* cu_seqlens;      // [T+1]
  const int64_t* region_lengths;  // [I], or null
  double scale;
  void* nodes;                    // [I, N+T, S]
  void* inverse;
  const void* grad;               // of nodes
  void* d_image;                  // or null
  void* d_image_global;           // or null
  void* d_words;                  // or null
  void* d_caption_global;         // or null
  void* d_local_weight;           // or null
  void* d_local_bias;             // or null
  void* d_global_weight;          // or null
  void* d_global_bias;            // or null
  Dtype dtype;                    // of all tensors of floats
  int64_t I;
  int64_t R;
  int64_t T;
  int64_t N;
  int64_t D;
  int64_t S;
  int64_t bfloat16;               // products may multiply bfloat16 values
  int64_t threads;
};
static_assert(sizeof(SimilarityNodesCall) == 8 * 31);

}  // namespace itm_fast
