package sfp_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/sfp"
)

var f = sfp.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "sfp/"+name) }

// ethtool shows an image as it would that of a network interface, with single
// spaces. Kind is one of its ETH_MODULE_*.
func ethtool(t *testing.T, image []byte, kind int) string {
	dir := t.TempDir()
	lib, path := filepath.Join(dir, "lib.so"), filepath.Join(dir, "image")
	out, err := exec.Command("gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", lib, "testdata/ethtool.c").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, os.WriteFile(path, image, 0o644))
	tool := "ethtool"
	if _, err := exec.LookPath(tool); err != nil {
		tool = "/usr/sbin/ethtool" // where it is on Debian, which users may not have in their path
	}
	c := exec.Command(tool, "-m", "eth0")
	c.Env = append(os.Environ(), "LD_PRELOAD="+lib, "MODULE_EEPROM="+path, fmt.Sprintf("MODULE_TYPE=%d", kind))
	out, err = c.CombinedOutput()
	require.NoError(t, err, "%s", out)
	var lines []string
	for _, line := range strings.Split(string(out), "\n") {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(lines, "\n")
}

func pack(t testing.TB, name string) []byte {
	image := formtest.Pack(t, f, read(t, name+".sfp.jsonc"))
	require.True(t, f.Detect(image))
	return image
}

func TestEthtoolReadsOurFields(t *testing.T) {
	for _, c := range []struct {
		name       string
		size, kind int
		lines      []string
	}{
		{"lr", 512, 2, []string{
			"Identifier : 0x03 (SFP)", "Connector : 0x07 (LC)", "Transceiver type : 10G Ethernet: 10G Base-LR", "Encoding : 0x06 (64B/66B)",
			"BR, Nominal : 10300MBd", "Length (SMF,km) : 10km", "Length (SMF) : 10000m", "Laser wavelength : 1310nm",
			"Vendor name : NVS Optics", "Vendor OUI : 00:17:6a", "Vendor PN : NVS-10G-LR", "Vendor rev : A1", "Option values : 0x00 0x1a",
			"Vendor SN : NVS24070001", "Date code : 24021300", "Optical diagnostics support : Yes",
			"Laser bias current : 30.000 mA", "Laser output power : 0.5000 mW", "Receiver signal average optical power : 0.4000 mW",
			"Module temperature : 35.50 degrees C", "Module voltage : 3.3000 V",
			"Laser bias current low warning threshold : 15.000 mA", "Laser output power high alarm threshold : 2.2387 mW",
			"Module temperature low alarm threshold : -5.00 degrees C", "Module voltage high warning threshold : 3.4650 V",
			"Laser rx power low alarm threshold : 0.0100 mW",
		}},
		{"dac", 256, 1, []string{
			"Connector : 0x21 (Copper pigtail)", "Transceiver type : Passive Cable", "Length (Copper) : 3m",
			"Passive Cu cmplnce. : 0x01 (SFF-8431 appendix E)", "Vendor PN : NVS-DAC-3M", "Date code : 230630",
		}},
		{"sr4", 640, 3, []string{
			"Identifier : 0x11 (QSFP28)", "Extended identifier description : CDR present in TX, CDR present in RX", "Connector : 0x0c (MPO Parallel Optic)",
			"Transceiver type : 100G Ethernet: 100G Base-SR4 or 25GBase-SR", "Encoding : 0x05 (64B/66B)", "Length (OM3 50um) : 70m",
			"Transmitter technology : 0x00 (850 nm VCSEL)", "Laser wavelength : 850.000nm", "Laser wavelength tolerance : 10.000nm",
			"Vendor name : NVS Optics", "Vendor OUI : 00:17:6a", "Vendor PN : NVS-100G-SR4", "Vendor rev : 02", "Vendor SN : NVSQ0000042", "Date code : 24120501",
			"Module temperature : 41.00 degrees C", "Module voltage : 3.3100 V", "Laser tx bias current (Channel 4) : 6.800 mA",
			"Transmit avg optical power (Channel 3) : 0.9200 mW", "Rcvr signal avg optical power(Channel 2) : 0.8100 mW",
			"Laser bias current high warning threshold : 11.000 mA", "Laser output power low warning threshold : 0.1445 mW",
			"Module temperature low alarm threshold : -5.00 degrees C", "Module voltage low warning threshold : 3.1350 V",
			"Laser rx power high alarm threshold : 3.4673 mW",
		}},
	} {
		image := pack(t, c.name)
		require.Len(t, image, c.size)
		out := ethtool(t, image, c.kind)
		for _, line := range c.lines {
			require.Contains(t, out, line)
		}
	}
}

// What we say of a value in inspection, ethtool says too.
func TestEthtoolAgreesOnMeanings(t *testing.T) {
	image := pack(t, "lr")
	out := ethtool(t, image, 2)
	for name, line := range map[string]string{
		"a2.temp_low_alarm":        "Module temperature low alarm threshold",
		"a2.vcc_high_alarm":        "Module voltage high alarm threshold",
		"a2.tx_bias_high_warning":  "Laser bias current high warning threshold",
		"a2.tx_power_low_warning":  "Laser output power low warning threshold",
		"a2.rx_power_high_warning": "Laser rx power high warning threshold",
	} {
		value := formtest.Fields(t, f, image)[name].Value
		_, meaning, ok := strings.Cut(value, " ")
		require.True(t, ok)
		require.Contains(t, out, line+" : "+strings.TrimSuffix(meaning, " C"), "%s", value)
	}
}

func TestFields(t *testing.T) {
	fields := formtest.Fields(t, f, pack(t, "lr"))
	require.Equal(t, vpd.Field{Off: 2, Len: 1, Name: "connector", Value: "0x07 LC", CoveredBy: "cc_base"}, fields["connector"])
	require.Equal(t, vpd.Field{Off: 68, Len: 16, Name: "vendor_sn", Value: "NVS24070001", CoveredBy: "cc_ext"}, fields["vendor_sn"])
	require.Equal(t, vpd.Field{Off: 258, Len: 2, Name: "a2.temp_low_alarm", Value: "0xfb00 -5.00 C", CoveredBy: "a2.cc_dmi"}, fields["a2.temp_low_alarm"])
	require.Equal(t, "0x3f800000 1", fields["a2.rx_power_1"].Value)
	require.Empty(t, fields["a2.temp"].CoveredBy)
}

func TestFixtures(t *testing.T) {
	bad := map[string]string{
		"bad-part-number.bin": "cc_base at byte 0x3f: wrong check code: got 0x44, want 0x43",
		"bad-cc-ext.bin":      "cc_ext at byte 0xdf: wrong check code: got 0x31, want 0xb1",
		"bad-cc-dmi.bin":      "a2.cc_dmi at byte 0x15f: wrong check code: got 0x56, want 0x55",
		"zero-padded.bin":     "vendor_name at byte 0x14: is not printable ASCII with 0x20 behind it",
	}
	for _, name := range formtest.Images(t, f, "sfp") {
		image := read(t, name)
		require.True(t, f.Detect(image), name)
		problems := f.Verify(image)
		if bad[name] == "" {
			require.Empty(t, problems, name)
			continue
		}
		require.Len(t, problems, 1)
		require.Equal(t, bad[name], problems[0].String())
		fixed, changes, err := f.Fix(image)
		require.NoError(t, err)
		require.Equal(t, name != "zero-padded.bin", len(changes) == 1)
		require.Equal(t, name == "zero-padded.bin", len(f.Verify(fixed)) == 1)
	}
}

const goodSpec = `{
  "format": "sfp",
  "type": "sff8472",
  "identifier": "0x03",
  "ext_identifier": "0x04",
  "connector": "0x07",
  "transceiver": {
    "type": "hex",
    "data": "0000000100000000"
  },
  "encoding": "0x01",
  "br_nominal": 13,
  "length_om2_10m": 55,
  "length_om1_10m": 27,
  "vendor_name": "ACME",
  "vendor_oui": "00:90:65",
  "vendor_pn": "SFP-SX-1G",
  "vendor_rev": "1.0",
  "wavelength": 850,
  "options": "0x001a",
  "vendor_sn": "AC0000017",
  "date_code": "190101",
  "patches": [
    {
      "offset": "0x60",
      "type": "hex",
      "data": "696e7465726e616c"
    }
  ]
}
`

func TestParse(t *testing.T) {
	spec, warnings, err := f.Parse(read(t, "sx.bin"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, goodSpec, string(spec))
}

// A module's two identifiers are one if a spec has one.
func TestIdentifier(t *testing.T) {
	image, warnings, err := f.Pack([]byte(`{"format": "sfp", "type": "sff8636", "identifier": "0x0d"}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 256)
	require.Equal(t, []byte{0x0d, 0x0d}, []byte{image[0], image[128]})
}

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "sfp", "type": "sff8472", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "sfp"`},
		{"no type", `{"format": "sfp"}`, "type: missing; want one of sff8472, sff8636"},
		{"CMIS", `{"format": "sfp", "type": "cmis"}`, `type: unknown "cmis"`},
		{"unknown member", `"serial": 1`, "serial: unknown"},
		{"unknown member of A2h", `"a2": {"serial": 1}`, "a2.serial: unknown"},
		{"another type's member", `"page3": {}`, "page3: unknown"},
		{"another type's identifier", `"identifier": "0x11", "size": 512`, "recognised as sff8636, not sff8472"},
		{"no module's identifier", `"identifier": "0x55"`, "would not be recognised"},
		{"name long", `"vendor_name": "01234567890123456"`, "17 bytes, want at most 16"},
		{"name not ASCII", `"vendor_name": "ü"`, "not printable ASCII"},
		{"OUI of 2 bytes", `"vendor_oui": "00:17"`, "want three bytes such as 00:17:6a"},
		{"wavelength of 17 bits", `"wavelength": 65536`, "from 0 to 65535"},
		{"transceiver of 7 bytes", `"transceiver": {"type": "hex", "data": "00000000000000"}`, "7 bytes, want 8"},
		{"A2h in A0h", `"size": 256, "a2": {"temp": 0}`, "a2.temp: lies behind the image, which has 256 bytes"},
		{"check code without diagnostics", `"a2": {"cc_dmi": 1}`, "a2.cc_dmi: an image with these fields has none"},
		{"check code of 9 bits", `"cc_base": 256`, "from 0 to 255"},
		{"too small", `"size": 95`, "sff8472 takes 96"},
		{"too large", `"size": 16385`, "from 0 to 16384"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "95 bytes": read(t, "sx.bin")[:95], "zeros": make([]byte, 256), "erased": bytes.Repeat([]byte{0xff}, 256),
		"half a QSFP": read(t, "bad-cc-ext.bin")[:255], "too large": append([]byte{3}, make([]byte, sfp.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "sfp", "type": "sff8472", `, []formtest.Case{
		{"CC_BASE", `"cc_base": 1`, "cc_base at byte 0x3f: wrong check code: got 0x01, want 0x07"},
		{"CC_EXT", `"cc_ext": 1`, "cc_ext at byte 0x5f: wrong check code: got 0x01, want 0x00"},
		{"of A2h", `"size": 512, "diagnostic_monitoring": "0x40", "a2": {"cc_dmi": 1}`, "a2.cc_dmi at byte 0x15f"},
		{"A2h cut off", `"size": 300, "diagnostic_monitoring": "0x40"`, "a2.cc_dmi: is missing: the image ends before it"},
		{"CC_BASE of a QSFP", `{"format": "sfp", "type": "sff8636", "cc_base": 1}`, "cc_base at byte 0xbf"},
		{"CC_EXT of a QSFP", `{"format": "sfp", "type": "sff8636", "cc_ext": 1}`, "cc_ext at byte 0xdf"},
		{"two identifiers", `{"format": "sfp", "type": "sff8636", "lower": {"identifier": "0x0c"}}`, "lower.identifier at byte 0x0: is not the identifier of page 00h: got 0x0c, want 0x11"},
		{"serial number ends with zeros", `"vendor_sn": {"type": "text", "data": "1", "size": 16}`, "vendor_sn at byte 0x44: is not printable ASCII"},
	})
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		typ := rapid.SampledFrom([]string{"sff8472", "sff8636"}).Draw(t, "type")
		group := map[string]string{"sff8472": `"diagnostic_monitoring": "0x68", "a2": {"temp": %d, "rx_power_low_alarm": %d}`,
			"sff8636": `"page3": {"temp_high_alarm": %d, "tx_power_low_warning": %d}`}[typ]
		spec := fmt.Sprintf(`{"format": "sfp", "type": %q, "vendor_name": %q, "vendor_pn": %q, "vendor_sn": %q, "wavelength": %d, "vendor_oui": "%x",
			%s, "patches": [{"offset": 225, "type": "hex", "data": "%x"}]}`,
			typ, rapid.StringMatching(`[A-Z][A-Za-z ]{0,15}`).Draw(t, "name"), rapid.StringMatching(`[ -~]{0,15}[!-~]`).Draw(t, "part"),
			rapid.StringMatching(`[ -~]{0,15}[!-~]`).Draw(t, "serial"), rapid.Uint16().Draw(t, "wavelength"), rapid.SliceOfN(rapid.Byte(), 3, 3).Draw(t, "OUI"),
			fmt.Sprintf(group, rapid.Uint16().Draw(t, "first"), rapid.Uint16().Draw(t, "second")), rapid.SliceOfN(rapid.Byte(), 0, 31).Draw(t, "patch"))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		require.True(t, f.Detect(image))
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "sx.bin")[:128])
	formtest.Damage(t, f, read(t, "bad-cc-ext.bin"))
}

func FuzzSFP(fz *testing.F) {
	for _, name := range []string{"sx.bin", "bad-cc-ext.bin", "bad-cc-dmi.bin", "no-a2.bin", "zero-padded.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Add(pack(fz, "sr4"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	for _, name := range []string{"lr", "dac", "sr4"} {
		fz.Add(read(fz, name+".sfp.jsonc"))
	}
	fz.Add([]byte(goodSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
