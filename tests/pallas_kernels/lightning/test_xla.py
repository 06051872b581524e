from tests.pallas_kernels.lightning.suite import DecodeSuite


class TestXla(DecodeSuite):
    implementation = "xla"
    module = "xla"
