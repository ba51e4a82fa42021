package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
	"nvstore.dev/machine"
)

// job runs a QMP command that is a job, to its end.
func job(m *qtest.Machine, command string, args map[string]any) error {
	args["job-id"] = "j"
	if _, err := m.QMP(command, args); err != nil {
		return err
	}
	for {
		raw, err := m.QMP("query-jobs", nil)
		if err != nil {
			return err
		}
		var jobs []struct{ ID, Status, Error string }
		if err := json.Unmarshal(raw, &jobs); err != nil {
			return err
		}
		for _, j := range jobs {
			if j.ID != "j" || j.Status != "concluded" {
				continue
			}
			if _, err := m.QMP("job-dismiss", map[string]any{"id": "j"}); err != nil {
				return err
			}
			if j.Error != "" {
				return errors.New(j.Error)
			}
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// snapshot saves or loads memory, disk and state in one.
func snapshot(m *qtest.Machine, verb, tag string) error {
	return job(m, "snapshot-"+verb, map[string]any{"tag": tag, "vmstate": machine.DiskNode, "devices": []string{machine.DiskNode}})
}

// within runs what may hang for ever; it returns false if it does.
func within(m *qtest.Machine, d time.Duration, op func() error) (bool, error) {
	done := make(chan error, 1)
	go func() { done <- op() }()
	select {
	case err := <-done:
		return true, err
	case <-time.After(d):
		_ = m.Close() // which ends op
		<-done
		return false, nil
	}
}

// A vm is a machine's disk with a live extent for a device in its tail.
type vm struct {
	t   *testing.T
	dev nvDevice
	img string
}

// newVM makes a disk, and an attached live extent with a content.
func newVM(t *testing.T, d nvDevice, content []byte) *vm {
	dir := shortDir(t)
	v := &vm{t: t, dev: d, img: filepath.Join(dir, "vm.qcow2")}
	file := filepath.Join(dir, "content")
	require.NoError(t, os.WriteFile(file, content, 0o600))
	nvtool(t, "vm", "create", v.img, "--disk", "1M", "--max-disk", "1T", "--state", "4M")
	nvtool(t, "put", v.img, "tpm/permanent", "../../fixtures/tpm/tpm2-00.permall")
	nvtool(t, "put", v.img, d.blob, file, "--live")
	nvtool(t, "live", "attach", v.img)
	return v
}

// content records the live extent's checksum, as after the machine's end, and
// returns what it has.
func (v *vm) content() []byte {
	v.t.Helper()
	nvtool(v.t, "live", "detach", v.img)
	p := nvtool(v.t, "get", v.img, v.dev.blob)
	nvtool(v.t, "live", "attach", v.img)
	return p
}

// start starts the machine.
func (v *vm) start(more ...string) (*qtest.Machine, guest) {
	v.t.Helper()
	m, err := qtest.Start(v.dev.binary, append(v.args(), more...)...)
	require.NoError(v.t, err)
	v.t.Cleanup(func() { _ = m.Close() })
	return m, v.dev.open(v.t, m)
}

// args are QEMU's options: what vm args prints, but for the guest's disk.
func (v *vm) args() []string {
	var run struct {
		Blockdev []machine.Blockdev
		Live     []struct{ Options []string }
	}
	require.NoError(v.t, json.Unmarshal(nvtool(v.t, "vm", "args", v.img, "--json"), &run))
	args := append([]string{"-nodefaults"}, v.dev.board...)
	for _, b := range run.Blockdev {
		args = append(args, "-blockdev", b.String())
	}
	for _, l := range run.Live {
		args = append(args, l.Options...)
	}
	return args
}

func (v *vm) check() {
	v.t.Helper()
	nvtool(v.t, "check", v.img)
	out, err := exec.Command("qemu-img", "check", v.img).CombinedOutput()
	require.NoError(v.t, err, "%s", out)
}

func erased(d nvDevice) []byte { return bytes.Repeat([]byte{0xff}, int(d.size)) }

// Devices on live extents in the tail of the machine's disk: what the guest
// writes is in the blob; a snapshot taken live has it; and when the machine was
// off for the revert, the guest reads what there was.
func TestQEMUDevicesOnLiveExtents(t *testing.T) {
	for _, d := range nvDevices {
		t.Run(d.name, func(t *testing.T) {
			content := erased(d)
			copy(content[0x100:], "packed by nvtool")
			v := newVM(t, d, content)
			m, g := v.start()
			mustRead(t, g, 0x100, "packed by nvtool")
			require.NoError(t, g.write(0x200, []byte("AAAA")))
			require.NoError(t, snapshot(m, "save", "a"))
			require.NoError(t, g.write(0x300, []byte("BBBB")))
			mustRead(t, g, 0x200, "AAAA")
			require.NoError(t, m.Quit())
			copy(content[0x200:], "AAAA")
			then := bytes.Clone(content)
			copy(content[0x300:], "BBBB")
			require.True(t, bytes.Equal(content, v.content()))
			v.check()

			nvtool(t, "snapshot", "revert", v.img, "a")
			require.True(t, bytes.Equal(then, v.content()))
			m, g = v.start()
			mustRead(t, g, 0x200, "AAAA")
			mustRead(t, g, 0x300, "\xff\xff\xff\xff")
			require.NoError(t, m.Quit())
			require.True(t, bytes.Equal(then, v.content()))
			v.check()
		})
	}
}

// An EEPROM on an I2C bus of a BMC has a FRU that nvtool packed into the
// machine's disk. The guest reads it, a snapshot is taken, and the guest spoils
// it. After a revert it reads what was packed.
func TestEEPROMIsRevertedWithItsMachine(t *testing.T) {
	d := nvDevices[0]
	file := filepath.Join(t.TempDir(), "board.fru")
	fru := nvtool(t, "vpd", "pack", "../../fixtures/vpd/fru/server.fru.jsonc")
	v := newVM(t, d, fru)

	m, g := v.start()
	mustRead(t, g, 0, string(fru))
	require.NoError(t, snapshot(m, "save", "good"))
	serial := bytes.Index(fru, []byte("NVS0123456789"))
	require.Positive(t, serial)
	require.NoError(t, g.write(serial, []byte("XYZ")))
	mustRead(t, g, serial, "XYZ0123456789")
	require.NoError(t, m.Quit())
	require.NoError(t, os.WriteFile(file, v.content(), 0o600))
	require.Equal(t, 27, run([]string{"vpd", "verify", file}, io.Discard, io.Discard), "the checksum is wrong")

	nvtool(t, "vm", "revert", v.img, "good")
	require.True(t, bytes.Equal(fru, v.content()))
	m, g = v.start()
	mustRead(t, g, 0, string(fru))
	require.NoError(t, g.write(serial, []byte("ABC")))
	require.NoError(t, m.Quit())
	require.Equal(t, "ABC0123456789", string(v.content()[serial:][:13]))
	v.check()
}

// A snapshot that is loaded into a running machine reaches the image and the
// machine's memory. What it does to the device depends on the device, and README
// has the table: where this test fails, that has changed.
func TestQEMUDevicesAndLiveLoad(t *testing.T) {
	for _, d := range nvDevices {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			v := newVM(t, d, erased(d))
			monitor := filepath.Join(filepath.Dir(v.img), "qmp")
			m, g := v.start("-qmp", "unix:"+monitor+",server=on,wait=off")
			require.NoError(t, g.write(0x200, []byte("AAAA")))
			nvtool(t, "vm", "snapshot", "--qmp", monitor, "a")
			require.NoError(t, g.write(0x200, []byte("\x00\x00\x00\x00")))
			if d.name != "spapr-nvram" {
				var errs bytes.Buffer
				require.Equal(t, 18, run([]string{"vm", "revert", "--qmp", monitor, "a"}, io.Discard, &errs))
				require.Contains(t, errs.String(), "hint: end QEMU, nvtool vm revert DISK TAG")
				mustRead(t, g, 0x200, "\x00\x00\x00\x00")
			}
			ended, err := within(m, hangs, func() error { return snapshot(m, "load", "a") })
			require.NoError(t, err)
			shows := "nothing: QEMU hangs"
			if ended {
				shows = v.afterLoad(m, g)
			}
			t.Log("the guest reads " + shows)
			require.Contains(t, map[string][]string{
				"at24c-eeprom": {"nothing: QEMU hangs", "stale bytes"}, // 7.2; 10.0
				"m25p80":       {"stale bytes, and writes them back"},
				"spapr-nvram":  {"reverted bytes"},
			}[d.name], shows)

			// Off, reverted, and on again: without -loadvm, which leaves the
			// windows' requests waiting for good, but with the memory of the
			// snapshot, by a job.
			nvtool(t, "vm", "revert", v.img, "a")
			if d.name == "at24c-eeprom" {
				ends := v.monitor("quit\n", "-loadvm", "a")
				t.Logf("started with -loadvm, it comes up: %t", ends)
				require.Equal(t, ended, ends)
				_, g = v.start()
				mustRead(t, g, 0x200, "AAAA")
				return
			}
			_ = os.Remove(monitor)
			m, _ = v.start("-qmp", "unix:"+monitor+",server=on,wait=off")
			nvtool(t, "vm", "revert", "--qmp", monitor, "--stale-devices", "a")
			g = d.open(t, m)
			mustRead(t, g, 0x200, "AAAA")
			require.NoError(t, g.write(0x300, []byte("DDDD")))
			require.NoError(t, m.Quit())
			p := v.content()
			require.Equal(t, "AAAA", string(p[0x200:0x204]))
			require.Equal(t, "DDDD", string(p[0x300:0x304]))
			v.check()
		})
	}
}

// hangs is how long QEMU may take before a test says that it hangs. On a slow
// machine that is said too soon, which fails no test.
const hangs = 5 * time.Second

// afterLoad says what the guest reads at 0x200, where it wrote AAAA before the
// snapshot and zeros behind it. A reset of the machine changes nothing of that.
func (v *vm) afterLoad(m *qtest.Machine, g guest) string {
	first, err := g.read(0x200, 4)
	require.NoError(v.t, err)
	_, err = m.QMP("system_reset", nil)
	require.NoError(v.t, err)
	g = v.dev.open(v.t, m)
	mustRead(v.t, g, 0x200, string(first))
	require.NoError(v.t, g.write(0x210, []byte("CCCC")))
	require.NoError(v.t, m.Quit())
	switch image := string(v.content()[0x200:0x204]); {
	case string(first) == "AAAA" && image == "AAAA":
		return "reverted bytes"
	case image == "AAAA":
		return "stale bytes"
	default:
		require.Equal(v.t, string(first), image)
		return "stale bytes, and writes them back"
	}
}

// monitor gives commands to a QEMU that isn't driven by a test, and returns
// whether it ends.
func (v *vm) monitor(commands string, more ...string) bool {
	return monitor(v.t, hangs, v.dev.binary, commands, append(v.args(), more...)...)
}

func monitor(t *testing.T, limit time.Duration, binary, commands string, args ...string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"-S", "-display", "none", "-monitor", "stdio"}, args...)...)
	cmd.Stdin = strings.NewReader(commands)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return false
	}
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), "Error", "%s", commands)
	return true
}

// It is QEMU that hangs, with a disk and an EEPROM that nobody but QEMU made:
// 7.2 in loadvm, if the EEPROM has a drive. Without one it goes on.
func TestQEMUHangsWithoutUs(t *testing.T) {
	dir := shortDir(t)
	for _, f := range []struct{ name, size string }{{"disk", "1M"}, {"eeprom", "8192"}} {
		out, err := exec.Command("qemu-img", "create", "-f", "qcow2", filepath.Join(dir, f.name), f.size).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	args := []string{"-M", "ast2600-evb", "-nodefaults", "-drive", "if=none,id=d,file=" + filepath.Join(dir, "disk")}
	const device, script = "at24c-eeprom,bus=aspeed.i2c.bus.3,address=0x50,rom-size=8192", "savevm a\nloadvm a\nquit\n"
	require.True(t, monitor(t, time.Minute, "qemu-system-arm", script, append(args, "-device", device)...), "without a drive")
	ended := monitor(t, hangs, "qemu-system-arm", script,
		append(args, "-drive", "if=none,id=e,file="+filepath.Join(dir, "eeprom"), "-device", device+",drive=e")...)
	version, err := exec.Command("qemu-system-arm", "--version").Output()
	require.NoError(t, err)
	t.Logf("with a drive, loadvm ends: %t (%s)", ended, bytes.SplitN(version, []byte("\n"), 2)[0])
	require.Equal(t, bytes.Contains(version, []byte("version 7.2.")), !ended)
}
