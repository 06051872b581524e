from tests.pallas_kernels.lightning.ring.suite import RingSuite


class TestXla(RingSuite):
    implementation = "xla"
