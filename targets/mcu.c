/* Runs the model once: all memory is static, nothing is allocated. The values of `inputs` are the
 * program's business; here they are zeros. Start-up code and the linker script are the board's.
 */
#include "model.h"
#include "runtime.h"

static _Alignas(64) unsigned char workspace[SG_WORKSPACE_BYTES];
static _Alignas(64) unsigned char values[SG_BORDER_BYTES];

int main(void)
{
    static const int32_t starts[] = SG_BORDER_STARTS; /* inputs, then outputs */
    const void *inputs[SG_N_INPUTS];
    void *outputs[SG_N_OUTPUTS];
    sg_instance model;
    for (int32_t i = 0; i < SG_N_INPUTS; i++)
        inputs[i] = values + starts[i];
    for (int32_t i = 0; i < SG_N_OUTPUTS; i++)
        outputs[i] = values + starts[SG_N_INPUTS + i];
    if (sg_init(&model, sg_weights, SG_WEIGHTS_BYTES, workspace, sizeof workspace))
        return 1;
    return sg_instance_run(&model, inputs, outputs, 0) != SG_OK;
}
