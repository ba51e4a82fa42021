package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	_ "github.com/google/go-cmp/cmp" // go-tpm's tests need it
	"github.com/google/go-tpm/tpm2"
	"github.com/stretchr/testify/require"
)

// TestTools drives nvtpm with tpm2-tools, through the simulator's ports and
// through swtpm's two channels.
func TestTools(t *testing.T) {
	port := freePort(t)
	for name, c := range map[string]struct{ args, tcti []string }{
		"mssim": {[]string{"--mssim", fmt.Sprintf("port=%d", port)}, []string{fmt.Sprintf("mssim:host=127.0.0.1,port=%d", port)}},
		"swtpm": {[]string{"--server", fmt.Sprintf("type=tcp,port=%d", port), "--ctrl", fmt.Sprintf("type=tcp,port=%d", port+1), "--flags", "not-need-init"},
			[]string{fmt.Sprintf("swtpm:host=127.0.0.1,port=%d", port)}},
	} {
		t.Run(name, func(t *testing.T) {
			store := newStore(t, true)
			args := append(append([]string{"--tpm2", "--pid", "file=DIR/pid"}, store...), c.args...)
			p := start(t, "", args...)
			require.Eventually(t, func() bool { _, err := os.Stat(p.dir + "/pid"); return err == nil }, waitLong, waitShort, "%s", &p.out)
			tcti := c.tcti[0]
			dir := t.TempDir()
			file := func(name string) string { return filepath.Join(dir, name) }
			require.NoError(t, os.WriteFile(file("data"), []byte("0123456789abcdef"), 0o600))
			tool(t, tcti, "tpm2_startup", "-c")
			require.Len(t, strings.TrimSpace(tool(t, tcti, "tpm2_getrandom", "--hex", "8")), 16)
			tool(t, tcti, "tpm2_pcrextend", "7:sha256="+strings.Repeat("11", 32))
			tool(t, tcti, "tpm2_nvdefine", "0x1500016", "-s", "16")
			tool(t, tcti, "tpm2_nvwrite", "0x1500016", "-i", file("data"))
			require.Equal(t, "0123456789abcdef", tool(t, tcti, "tpm2_nvread", "-s", "16", "0x1500016"))
			tool(t, tcti, "tpm2_createprimary", "-G", "ecc", "-c", file("primary.ctx"))
			tool(t, tcti, "tpm2_evictcontrol", "-c", file("primary.ctx"), "0x81010001")
			tool(t, tcti, "tpm2_flushcontext", "-t")
			// A secret that opens with PCR 7 as it is.
			tool(t, tcti, "tpm2_createpolicy", "--policy-pcr", "-l", "sha256:7", "-L", file("policy"))
			tool(t, tcti, "tpm2_create", "-C", "0x81010001", "-i", file("data"), "-L", file("policy"), "-u", file("pub"), "-r", file("priv"))
			tool(t, tcti, "tpm2_flushcontext", "-t")
			tool(t, tcti, "tpm2_load", "-C", "0x81010001", "-u", file("pub"), "-r", file("priv"), "-c", file("key.ctx"))
			tool(t, tcti, "tpm2_flushcontext", "-t")
			require.Equal(t, "0123456789abcdef", tool(t, tcti, "tpm2_unseal", "-c", file("key.ctx"), "-p", "pcr:sha256:7"))
			tool(t, tcti, "tpm2_shutdown")
			p.stop()

			// All of it is there for the next process; not the PCRs.
			p = start(t, "", args...)
			require.Eventually(t, func() bool { _, err := os.Stat(p.dir + "/pid"); return err == nil }, waitLong, waitShort, "%s", &p.out)
			tool(t, tcti, "tpm2_startup", "-c")
			require.Equal(t, "0123456789abcdef", tool(t, tcti, "tpm2_nvread", "-s", "16", "0x1500016"))
			require.Contains(t, tool(t, tcti, "tpm2_getcap", "handles-persistent"), "0x81010001")
			require.Contains(t, tool(t, tcti, "tpm2_pcrread", "sha256:7"), strings.Repeat("0", 64))
			p.stop()
		})
	}
}

// TestGoTPM runs go-tpm's own tests of every command that it knows against
// nvtpm, over a unix socket and over the simulator's ports.
func TestGoTPM(t *testing.T) {
	work := t.TempDir()
	dir := goTPM(t, work)
	build := exec.Command("go", "test", "-c", "-o", work+"/gotpm.test", "./tpm2/test")
	build.Dir = dir
	build.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	self, err := os.Executable()
	require.NoError(t, err)
	store := newStore(t, true)
	transports := []string{"unix", "mssim"}
	if testing.Short() {
		transports = transports[:1]
	}
	for _, how := range transports {
		t.Run(how, func(t *testing.T) {
			cmd := exec.Command(work+"/gotpm.test", "-test.v", "-test.skip", strings.Join(notInLibtpms, "|"))
			cmd.Dir = dir + "/tpm2/test" // for its vectors
			cmd.Env = append(os.Environ(), "NVTPM_PROGRAM="+self, "NVTPM_TRANSPORT="+how, "NVTPM_BLANK="+store[1], "NVTPM_KEY="+store[3])
			out, err := cmd.CombinedOutput()
			passed := len(regexp.MustCompile(`(?m)^--- PASS`).FindAll(out, -1))
			t.Logf("%d of go-tpm's tests passed", passed)
			require.NoError(t, err, "%s", failures(out))
			require.Greater(t, passed, 30)
		})
	}
}

// goTPM copies the module that our go.mod names, with our stand-in for its
// simulator, and with our versions of what it needs.
func goTPM(t *testing.T, work string) string {
	list := func(module string) string {
		out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}} {{.Version}}", module).Output()
		require.NoError(t, err)
		return strings.TrimSpace(string(out))
	}
	from, _, _ := strings.Cut(list("github.com/google/go-tpm"), " ")
	dir := work + "/go-tpm"
	for _, sub := range []string{"tpm2", "tpmutil", "legacy"} {
		require.NoError(t, os.CopyFS(filepath.Join(dir, sub), os.DirFS(filepath.Join(from, sub))))
	}
	mod := "module github.com/google/go-tpm\n\ngo 1.24\n"
	for _, m := range []string{"github.com/google/go-cmp", "golang.org/x/sys"} {
		_, version, _ := strings.Cut(list(m), " ")
		mod += "\nrequire " + m + " " + version + "\n"
	}
	require.NoError(t, os.WriteFile(dir+"/go.mod", []byte(mod), 0o600))
	sums, err := os.ReadFile("../../go.sum")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(dir+"/go.sum", sums, 0o600))
	stand, err := os.ReadFile("testdata/simulator.go.txt")
	require.NoError(t, err)
	name := dir + "/tpm2/transport/simulator/simulator.go"
	require.NoError(t, os.Chmod(name, 0o600))
	require.NoError(t, os.WriteFile(name, stand, 0o600))
	return dir
}

// notInLibtpms are tests that want refused what libtpms has: RSA of 3072 bits.
var notInLibtpms = []string{"^TestTestParms$/^rsa3072"}

// failures are the lines that say FAIL, and the few before each.
func failures(out []byte) string {
	var b strings.Builder
	lines := strings.Split(string(out), "\n")
	for i, l := range lines {
		if strings.Contains(l, "--- FAIL") {
			b.WriteString(strings.Join(lines[max(0, i-3):i+1], "\n") + "\n")
		}
	}
	return b.String()
}

// nvDefine and nvWrite use an index with an empty password.
func nvDefine(t testing.TB, c *tpm, index tpm2.TPMHandle, size uint16) *tpm2.NVReadPublicResponse {
	t.Helper()
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: size,
			Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}),
	}.Execute(c)
	require.NoError(t, err)
	return nvPublic(t, c, index)
}

func nvPublic(t testing.TB, c *tpm, index tpm2.TPMHandle) *tpm2.NVReadPublicResponse {
	t.Helper()
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
	require.NoError(t, err)
	return pub
}

func nvWrite(c *tpm, pub *tpm2.NVReadPublicResponse, index tpm2.TPMHandle, off uint16, p []byte) error {
	_, err := tpm2.NVWrite{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: p}, Offset: off,
	}.Execute(c)
	return err
}

func nvRead(t testing.TB, c *tpm, index tpm2.TPMHandle, n uint16) []byte {
	t.Helper()
	pub := nvPublic(t, c, index)
	rsp, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName}, Size: n,
	}.Execute(c)
	require.NoError(t, err)
	return rsp.Data.Buffer
}
