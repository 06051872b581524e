from tests.pallas_kernels.lightning.suite import Suite


class TestChunked(Suite):
    implementation = "chunked"
