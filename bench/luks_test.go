package bench

import (
	"crypto/aes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	xtspeer "golang.org/x/crypto/xts"

	"nvstore.dev/crypto/xts"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
)

// luksTables compares AES-XTS, conversion and unlocking with their peers.
func luksTables(t *testing.T) {
	xtsTable(t)
	dir := directory(t)
	own := built(t, dir, "nvtool")
	pass := filepath.Join(dir, "pass")
	require.NoError(t, os.WriteFile(pass, []byte("correct horse"), 0o600))
	luksConvertTable(t, dir, own, pass)
	unlockTable(t, dir, own, pass)
}

// xtsTable encrypts and decrypts with one core, a buffer that fits a cache. The
// rounds of the subjects are interleaved, and the best counts.
func xtsTable(t *testing.T) {
	const buffer = 64 << 10
	key, p := make([]byte, 64), make([]byte, buffer)
	for i := range key {
		key[i] = byte(i)
	}
	c, err := xts.New(key)
	require.NoError(t, err)
	x, err := xtspeer.NewCipher(aes.NewCipher, key)
	require.NoError(t, err)
	tb := &table{title: "AES-256-XTS on one core, MB a second of CPU time; goals: 10 times x/crypto, 0.8 of openssl, which sets no IV for a sector",
		columns: []string{"sector", "encrypt", "decrypt", "x/crypto", "ratio", "openssl", "ratio"}}
	for _, size := range scale([]int{512, 1024, 2048, 4096}, []int{4096}) {
		var enc, dec, theirs, ssl float64
		for range scale(5, 1) {
			enc = max(enc, throughput(t, buffer, func() { c.EncryptSectors(p, p, 1, size) }))
			dec = max(dec, throughput(t, buffer, func() { c.DecryptSectors(p, p, 1, size) }))
			theirs = max(theirs, throughput(t, buffer, func() {
				for i := 0; i < buffer; i += size {
					x.Encrypt(p[i:i+size], p[i:i+size], uint64(i))
				}
			}))
			ssl = max(ssl, opensslXTS(t, size))
		}
		tb.add(size, whole1(enc), whole1(dec), whole1(theirs), enc/theirs, whole1(ssl), enc/ssl)
	}
	show(tb)
}

func whole1(f float64) string { return fmt.Sprintf("%.0f", f) }

// throughput is how many MB fn does in a second of CPU time, as "openssl speed"
// counts it, n bytes a call.
func throughput(t *testing.T, n int, fn func()) float64 {
	calls := 0
	start := time.Now()
	before, err := cpuTime(nil)
	require.NoError(t, err)
	for time.Since(start) < scale(300*time.Millisecond, 5*time.Millisecond) {
		for range 16 {
			fn()
		}
		calls += 16
	}
	after, err := cpuTime(nil)
	require.NoError(t, err)
	return float64(n) * float64(calls) / 1e6 / (after - before).Seconds()
}

// opensslXTS is what "openssl speed" says, in MB/s.
func opensslXTS(t *testing.T, size int) float64 {
	out, err := exec.Command("openssl", "speed", "-seconds", "1", "-bytes", strconv.Itoa(size), "-evp", "aes-256-xts").CombinedOutput()
	require.NoError(t, err, "%s", out)
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	fields := strings.Fields(lines[len(lines)-1])
	kb, err := strconv.ParseFloat(strings.TrimSuffix(fields[len(fields)-1], "k"), 64)
	require.NoError(t, err, "%s", out)
	return kb / 1000
}

// luksConvertTable writes into and reads images that are there, so that nobody's
// key derivation is in it.
func luksConvertTable(t *testing.T, dir, own, pass string) {
	n := imageMiB(t) << 20
	raw := filepath.Join(dir, "disk.raw")
	realFiles(t, raw, n)
	format := func(name, kind string) string {
		path := filepath.Join(dir, name)
		p, err := chain.Create(path, &chain.CreateOptions{Format: kind, Size: n,
			LUKS: &luks.FormatOptions{Version: 1, Passphrase: []byte("correct horse"), Iterations: 1000}})
		require.NoError(t, err)
		require.NoError(t, p.Device.Sync())
		require.NoError(t, p.Commit())
		require.NoError(t, p.Device.Close())
		return path
	}
	image, inside := format("luks", chain.LUKS), format("qcow2", chain.QCOW2)
	const object = "convert --object secret,id=s,file="
	theirs := map[string]string{image: "driver=luks,key-secret=s,file.filename=" + image,
		inside: "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=" + inside}
	tb := &table{title: fmt.Sprintf("LUKS images of %d MiB of real files, aes-256-xts, not made durable; qemu-img, then nvtool, best of all runs; a ratio above 1 means that nvtool is faster", n>>20),
		columns: []string{"job", "wall s", "wall s", "ratio", "goal", "CPU s", "CPU s", "ratio", "MiB RAM", "MiB RAM", "MiB file", "MiB file"}}
	for _, k := range []struct{ name, path, format string }{{"LUKS", image, "luks"}, {"qcow2 with LUKS", inside, "qcow2"}} {
		write := job{name: "write " + k.name, runs: scale(5, 1), goal: 3,
			args: object + pass + " -t unsafe -n -f raw " + raw + " --target-image-opts " + theirs[k.path],
			own:  "convert -t unsafe -n -f raw --secret-file out=" + pass + " --target-image-opts " + strings.ReplaceAll(theirs[k.path], "key-secret=s", "key-secret=out") + " " + raw}
		read := job{name: "read " + k.name, runs: scale(5, 1), goal: 3, output: true,
			args: object + pass + " -t unsafe --image-opts " + theirs[k.path] + " -O raw OUT",
			own:  "convert -t unsafe -f " + k.format + " -O raw --secret-file " + pass + " " + k.path + " OUT"}
		write.add(t, dir, own, tb)
		read.add(t, dir, own, tb)
	}
	show(tb)
}

// unlockTable tries a passphrase, in a process of its own each.
func unlockTable(t *testing.T, dir, own, pass string) {
	tb := &table{title: "Trying a passphrase, in a process of its own; cryptsetup, then nvtool, medians of wall milliseconds",
		columns: []string{"derivation", "cryptsetup", "nvtool", "ratio"}}
	for _, k := range []struct{ name, args string }{
		{"LUKS1, PBKDF2-SHA256, 1000000 iterations", "--type luks1 --pbkdf-force-iterations 1000000"},
		{"LUKS2, Argon2id, 256 MiB, 4 passes, 2 lanes", "--type luks2 --pbkdf argon2id --pbkdf-memory 262144 --pbkdf-force-iterations 4 --pbkdf-parallel 2"},
	} {
		path := filepath.Join(dir, "unlock")
		require.NoError(t, os.WriteFile(path, nil, 0o600))
		require.NoError(t, os.Truncate(path, 20<<20))
		out, err := exec.Command("cryptsetup", append(append([]string{"luksFormat", "-q"}, strings.Fields(k.args)...), path, pass)...).CombinedOutput()
		require.NoError(t, err, "%s", out)
		var peak int64
		run := func(args ...string) subject {
			return subject{args[0], func(string) (runner, error) { return &process{args: args, peak: &peak}, nil }}
		}
		rows := measureTurns(t, dir, []subject{run("cryptsetup", "open", "--test-passphrase", path, "-d", pass),
			run(own, "luks", "open", "--test", path, "--secret-file", pass)}, scale(7, 1), 1)
		ms := func(d time.Duration) string { return fmt.Sprintf("%.0f", float64(d)/1e6) }
		tb.add(k.name, ms(rows[0].median()), ms(rows[1].median()), ratio(rows[0].median(), rows[1].median()))
	}
	show(tb)
}
