from tests.pallas_kernels.lightning_attention.suite import DecodeSuite


class TestXla(DecodeSuite):
    implementation = "xla"
    module = "decode"
