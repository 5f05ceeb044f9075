// Attention: the form that fits the number of query rows.
#pragma once

#include "attention_few.h"
#include "attention_many.h"

namespace tw {

// Attention of any number of queries; every worker of the team calls it. own: PromptScratch<T, C>::size(D, DV) bytes of
// this worker; shared: attention_parts_floats(...) floats of the team. T: the element type of queries and result; C: of
// keys and values.
template <class T, class C, int D, int DV>
static inline void attend(const Worker& worker, const AttentionShape& s, const T* q, const C* k, const C* v, T* out,
                          char* own, float* shared) {
    if (s.queries * s.heads_per_group() <= FEW_ROWS) {
        attend_few<T, C, D, DV>(worker, s, q, k, v, out, shared);
    } else {
        attend_many<T, C, D, DV>(worker, s, q, k, v, out, own);
    }
}

}  // namespace tw
