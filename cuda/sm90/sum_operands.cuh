// The sums of a warpgroup's product as the first operands of an instruction: by their number, how a list of them begins
// in the text, and what they are bound to.
#pragma once

#define JBS_SUM32                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JBS_SUM64                                                                      \
  JBS_SUM32                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JBS_SUM96                                                                      \
  JBS_SUM64                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JBS_SUM128                                                                                 \
  JBS_SUM96                                                                                        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define JBS_INOUT4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JBS_INOUT16(d, i) JBS_INOUT4(d, i), JBS_INOUT4(d, i + 4), JBS_INOUT4(d, i + 8), JBS_INOUT4(d, i + 12)
#define JBS_INOUT32(d) JBS_INOUT16(d, 0), JBS_INOUT16(d, 16)
#define JBS_INOUT64(d) JBS_INOUT32(d), JBS_INOUT16(d, 32), JBS_INOUT16(d, 48)
#define JBS_INOUT96(d) JBS_INOUT64(d), JBS_INOUT16(d, 64), JBS_INOUT16(d, 80)
#define JBS_INOUT128(d) JBS_INOUT96(d), JBS_INOUT16(d, 96), JBS_INOUT16(d, 112)
